"""What a reader gets of results.json: table.md, bars.png, gains.png and the table on the terminal.

table.md is laid out as the README tables of the family: a table per domain and size of model, a column per
benchmark, the models as the vendor published them above the ones measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from baichuan_sft.commit import write_synced
from baichuan_sft.data.texts import plain
from baichuan_sft.evaluate import plots, published
from baichuan_sft.evaluate.benchmarks import BENCHMARKS, DOMAINS

Results = dict[str, Any]  # results.json
Task = dict[str, Any]  # an entry of its "tasks"

# The six domains in the README's order; some share a table there.
SECTIONS = {
    "General": ("general",),
    "Law and medicine": ("law", "medicine"),
    "Mathematics and code": ("math", "code"),
    "Multilingual": ("translation",),
}
PIPE_WIDTH = 120  # columns where there is no terminal
STYLES = {"gained": "green", "lost": "bold red", "within noise": "dim"}
LEGEND = (
    "Accuracy and pass@k in percent, BLEU in points. Brackets: 95 % interval (Wilson; of BLEU by bootstrap). "
    "Rows without brackets: as published by the vendor."
)
FALSE_ALARMS = "At p < 0.05, of twenty tasks that have not changed about one is called gained or lost."


def write(directory: str | Path, results: Results | list[Results], verdicts: list[dict] | None = None) -> str:
    """Write table.md and bars.png; with verdicts gains.png too.

    Args:
        results: of one model, or of several for one table.
        verdicts: of ``compare.verdicts``.
    Returns:
        the table for the terminal, in colours where stdout is one.
    """
    models = [results] if isinstance(results, dict) else results
    write_synced(Path(directory, "table.md"), markdown(models, verdicts or []))
    series: dict[str, dict[str, Task]] = {}
    for each in models:
        for task in each["tasks"]:
            if task["value"] is not None:
                series.setdefault(f"{label(each)} ({task['style']})", {})[task["benchmark"]] = task
    names = [name for name in BENCHMARKS if any(name in tasks for tasks in series.values())]
    if names:
        plots.bars(Path(directory, "bars.png"), names, series)
    if any(verdict["verdict"] for verdict in verdicts or []):
        plots.gains(Path(directory, "gains.png"), verdicts or [])
    return terminal(models, verdicts or [])


def label(results: Results) -> str:
    """Of a model: the end of its path, its revision and quantisation."""
    model = results["model"]
    words = [str(model[name]) for name in ("revision", "quantization") if model.get(name)]
    return plain(" ".join(["/".join(Path(model["path"]).absolute().parts[1:][-2:]), *words]))


def number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def interval(task: Task) -> str:
    """``53.98 [52.10, 55.85]``"""
    if task["value"] is None:
        return "error" if task["error"] else "-"
    return f"{task['value']:.2f} [{task['low']:.2f}, {task['high']:.2f}]"


def shots(task: Task) -> str:
    """``5``, or ``3-5`` where prompts had to be shortened."""
    numbers = sorted(map(int, task["shots"]))
    return "-".join(map(str, dict.fromkeys(numbers[:1] + numbers[-1:]))) or "-"


# Of a task: the first eight on the terminal, all in table.md.
COLUMNS: dict[str, Callable[[Task], str]] = {
    "task": lambda task: task["benchmark"],
    "style": lambda task: task["style"],
    "shots": shots,
    "items": lambda task: f"{task['items']:,}",
    "result": interval,
    "published": lambda task: number(task["published"], ".2f"),
    "seconds": lambda task: number(task["seconds"], ",.1f"),
    "tokens/s": lambda task: number(task["tokens_per_second"], ",.0f"),
    "items/s": lambda task: number(task["items_per_second"], ",.1f"),
    "metric": lambda task: task["metric"] or "-",
    "skipped": lambda task: f"{sum(task['skipped'].values()):,}",
    "data sha256": lambda task: (task["data_sha256"] or "-")[:12],
    "prompts sha256": lambda task: (task["prompts_sha256"] or "-")[:12],
}
# Of a verdict that could be made.
VERDICT: dict[str, Callable[[dict], str]] = {
    "verdict": lambda verdict: f"**{verdict['verdict']}**",
    "before": lambda verdict: number(verdict["before"], ".2f"),
    "after": lambda verdict: number(verdict["after"], ".2f"),
    "difference": lambda verdict: f"{verdict['difference']:+.2f}",
    "p": lambda verdict: f"{verdict['p']:.2g}",
    "wins": lambda verdict: f"{verdict['wins']:,}",
    "losses": lambda verdict: f"{verdict['losses']:,}",
    "items": lambda verdict: f"{verdict['items']:,}",
    "note": lambda verdict: verdict["note"],
}


# --- table.md ---------------------------------------------------------------------------------------------


def markdown(models: list[Results], verdicts: list[dict]) -> str:
    blocks = ["# Evaluation", LEGEND]
    measured = {task["benchmark"] for each in models for task in each["tasks"]}
    for section, domains in SECTIONS.items():
        columns = [name for domain in domains for name in DOMAINS[domain]]
        if measured.intersection(columns):
            blocks += [f"## {section}", *by_size(columns, models)]
    if verdicts:
        rows = [
            [v["benchmark"], v["style"], *(cell(v) for cell in VERDICT.values())]
            if v["verdict"]
            else [v["benchmark"], v["style"], "not compared", *["-"] * (len(VERDICT) - 2), plain(v["error"])]
            for v in verdicts
        ]
        blocks += ["## Before and after", markdown_table(["task", "style", *VERDICT], rows), FALSE_ALARMS]
    rows = [
        [label(each), *(cell(task) for cell in COLUMNS.values())] for each in models for task in each["tasks"]
    ]
    notes = "\n".join(f"- {plain(line)}" for line in dict.fromkeys(remarks(models)))
    blocks += ["## Details", markdown_table(["model", *COLUMNS], rows), "## Notes", notes]
    return "\n\n".join(blocks) + "\n"


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---", *[":---:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def by_size(columns: list[str], models: list[Results]) -> list[str]:
    """Headings and tables: the published rows of that size, then a row per model and style."""
    blocks = []
    average = columns == list(DOMAINS["translation"])  # the only README table that has one
    for size, known in published.TABLES.items():
        rows, others = [], dict.fromkeys(known)
        for each in models:
            if size != ("13B" if "13b" in str(each["model"].get("variant")).lower() else "7B"):
                continue
            others |= dict.fromkeys(filter(None, [published.name_of(each["model"])]))
            for style in dict.fromkeys(task["style"] for task in each["tasks"]):
                tasks = {task["benchmark"]: task for task in each["tasks"] if task["style"] == style}
                if tasks.keys() & set(columns):
                    values = [tasks[name]["value"] if name in tasks else None for name in columns]
                    cells = [result(tasks[name]) if name in tasks else "-" for name in columns]
                    rows.append([f"**{label(each)}** ({style})", *cells, *[mean(values)] * average])
        if rows:
            figures = {name: [published.FIGURES[name].get(column) for column in columns] for name in others}
            above = [
                [name, *(number(value, ".2f") for value in values), *[mean(values)] * average]
                for name, values in figures.items()
                if any(values)
            ]
            shot_row = ["", *(f"{BENCHMARKS[name].shots}-shot" for name in columns), *[""] * average]
            titles = ["", *(f"**{BENCHMARKS[name].title}**" for name in columns), *["Average"] * average]
            blocks += [f"### {size} models", markdown_table(titles, [shot_row, *above, *rows])]
    return blocks


def mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(sum(known) / len(known) if len(known) == len(values) else None, ".2f")


def result(task: Task) -> str:
    """With its shots, where they are not the vendor's."""
    other = task["shots"] and shots(task) != str(BENCHMARKS[task["benchmark"]].shots)
    return interval(task) + (f" ({shots(task)}-shot)" if other else "")


def remarks(models: list[Results]) -> Iterable[str]:
    """What else is to be known: errors, other metrics, what was left out or is absent, sources."""
    for each in models:
        for task in each["tasks"]:
            name = task["benchmark"]
            if task["error"]:
                yield f"{name} ({task['style']}): {task['error']}"
            yield from (f"{name}: {note}" for note in task["notes"])
            yield from (f"{name}: {count:,} items skipped, {why}" for why, count in task["skipped"].items())
            if task["more"]:
                values = ", ".join(f"{metric} {value:.2f}" for metric, value in task["more"].items())
                yield f"{name} ({task['style']}): {values}"
            if name in published.REMARKS:
                yield f"{name}: {published.REMARKS[name]}"
        yield from (f"absent: {line}" for line in each["absent"])
        name = published.name_of(each["model"]) or "none of its shape"
        yield f"published beside {label(each)}: {name}; {published.SOURCE}"


# --- the terminal -----------------------------------------------------------------------------------------


def terminal(models: list[Results], verdicts: list[dict]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False, emoji=False)  # a path may be named "[bold]"
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    columns = list(COLUMNS)[:8]
    changes = {
        (v["benchmark"], v["style"]): Text(f"{v['difference']:+.2f} {v['verdict']}", STYLES[v["verdict"]])
        for v in verdicts
        if v["verdict"]
    }
    with console.capture() as shown:
        for each in models:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=label(each), title_justify="left")
            for column in columns:
                table.add_column(column, justify="left" if column in ("task", "style") else "right")
            if verdicts:
                table.add_column("after - before")
            for task in each["tasks"]:
                change = [changes.get((task["benchmark"], task["style"]), "-")] if verdicts else []
                table.add_row(*(COLUMNS[column](task) for column in columns), *change)
            console.print(table)
            lines = {
                f"{t['benchmark']} ({t['style']}): {t['error']}": "bold red"
                for t in each["tasks"]
                if t["error"]
            }
            lines |= {f"absent: {line}": "dim" for line in each["absent"]}
            lines |= {f"not compared: {v['error']}": "yellow" for v in verdicts if not v["verdict"]}
            for line, style in lines.items():
                console.print(Text(plain(line), style), soft_wrap=True)
    return shown.get()
