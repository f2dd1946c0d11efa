"""All tasks on one model: data read first, entries and results.json written as they come, the report last."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from baichuan_sft import __version__
from baichuan_sft.commit import write_synced
from baichuan_sft.data.progress import Progress
from baichuan_sft.errors import EnvironmentFault, UserError, first_line
from baichuan_sft.evaluate import benchmarks, runner
from baichuan_sft.evaluate.benchmarks import BENCHMARKS, DOMAINS
from baichuan_sft.evaluate.items import Loaded, Settings
from baichuan_sft.evaluate.journal import differences

RESULTS = "results.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "sacrebleu")


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Attributes:
        label: of the curve, and of the directory where there are several.
    """

    path: str
    revision: str | None
    label: str


@dataclass(frozen=True)
class Tasks:
    """The benchmarks that were asked for.

    Attributes:
        found: name -> its items, or why there are none.
        absent: the lines on those of "all" or a domain whose files are not there.
    """

    found: dict[str, Loaded | UserError]
    absent: list[str]


def load_tasks(args: Any) -> Tasks:
    """All data, before a model is loaded: mistakes are seen at once."""
    from baichuan_sft.evaluate import data

    settings = settings_of(args)
    words = [word.strip() for word in args.tasks.split(",")]
    named = {
        name for word in words if word not in DOMAINS and word != "all" for name in benchmarks.select(word)
    }
    tasks = Tasks({}, [])
    absent: dict[str, list[str]] = {}  # by where they come from, as seven translations come from one
    for name in benchmarks.select(args.tasks):
        try:
            loaded = data.load(name, args.data_dir, settings)
            runner.check_sandbox(BENCHMARKS[name], settings)
            tasks.found[name] = data.draw(loaded, args.limit, args.seed) if args.limit else loaded
        except UserError as error:
            if isinstance(error, data.Absent) and name not in named:
                absent.setdefault(BENCHMARKS[name].source, []).append(str(error))
            else:
                tasks.found[name] = error
    for same in absent.values():
        tasks.absent.append(", ".join([*(text.split(":")[0] for text in same[:-1]), same[-1]]))
    errors = [first_line(error) for error in tasks.found.values() if isinstance(error, UserError)]
    if len(errors) == len(tasks.found):
        why = (
            "; ".join(errors)
            or f"{args.data_dir} has none of --tasks {args.tasks}, --list says what goes where"
        )
        raise UserError(f"nothing to ask: {why.rstrip('.')}.")
    return tasks


def styles_of(args: Any) -> list[str]:
    return list(runner.STYLES) if args.style == "both" else [args.style]


def settings_of(args: Any) -> Settings:
    return Settings(args.shots, args.seed, args.samples, args.allow_unsandboxed)


def evaluate(target: Target, args: Any, tasks: Tasks, out: Path, before: Path | None) -> dict[str, Any]:
    """Run all tasks on one model; write and print what came out.

    Returns:
        what is in results.json, and the entries of tasks that ``failed`` where a result was there.
    Raises:
        UserError: ``out`` holds results of another run.
    """
    from transformers.utils.logging import disable_progress_bar

    from baichuan_sft.evaluate import compare, models, report
    from baichuan_sft.evaluate.scorer import Scorer

    if not sys.stderr.isatty():
        disable_progress_bar()
    gc.collect()  # the model before this one
    options = dict(dtype=args.dtype, device=args.device, quantize=args.quantize, revision=target.revision)
    model = models.open_model(target.path, **options)
    chat = model.chat if args.chat == "auto" else args.chat == "on"
    scorer = Scorer(model.model, model.tokenizer, chat=chat, batch_tokens=args.batch_tokens)
    settings = {
        **asdict(settings_of(args)),
        **dict(limit=args.limit, chat=chat),
        **dict(max_length=scorer.max_length, batch_tokens=scorer.batch_tokens),
    }
    results: dict[str, Any] = {
        **dict(format=runner.FORMAT, model=model.facts, settings=settings, versions=versions()),
        **dict(tasks=[], absent=tasks.absent),
    }
    entries, failed = earlier(out, results), []
    todo = [(name, style) for name in tasks.found for style in styles_of(args)]
    for place, (name, style) in enumerate(todo, 1):
        label = f"{target.label} {place}/{len(todo)} {name} ({style})"
        file = out / "items" / f"{name}.{style}.jsonl"
        found = tasks.found[name]
        entry = run_task(label, (name, style), found, scorer, settings_of(args), file, model.facts)
        old = entries.get((name, style))
        if old and entry["items"] and entry["tokens_per_second"] is None:  # all items were there
            entry |= {key: old[key] for key in old if key.endswith(("seconds", "per_second"))}
        if entry["error"] and old and not old["error"]:  # what there is stays
            failed.append(entry)
        else:
            entries[name, style] = entry
        results["tasks"] = [entries[key] for key in sorted(entries, key=order)]
        write(out / RESULTS, results)
    if before:
        results["verdicts"] = compare.verdicts(out, before)
        write(out / RESULTS, results)
    print(report.write(out, results, results.get("verdicts")))
    for entry in failed:
        print(f"{entry['benchmark']} ({entry['style']}): {entry['error']} The earlier result stays.")
    return {**results, "failed": failed}


def run_task(
    label: str,
    task: tuple[str, str],
    found: Loaded | UserError,
    scorer: Any,
    settings: Settings,
    file: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """A task's entry; what the user can repair becomes its ``error``, and the other tasks go on."""
    benchmark, style = BENCHMARKS[task[0]], task[1]
    if isinstance(found, UserError):
        return runner.blank(benchmark, style, first_line(found))
    with Progress(label, 0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        try:
            return runner.run(benchmark, style, found, scorer, settings, file, facts=facts, progress=show)
        except UserError as error:
            return runner.blank(benchmark, style, first_line(error))


def earlier(out: Path, results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Entries of results.json that an earlier run left.

    Raises:
        UserError: results of another model, or asked in another way.
    """
    try:
        found = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        tasks = {(task["benchmark"], task["style"]): task for task in found["tasks"]}
        before = {**found["settings"], "model": found["model"]["fingerprint"], "format": found["format"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{out / RESULTS}: cannot be read as results; give another --output_dir.") from None
    now = {**results["settings"], "model": results["model"]["fingerprint"], "format": results["format"]}
    if before == now:
        return tasks
    if all(task["error"] for task in tasks.values()):
        return {}
    other = differences(json.dumps(before).encode(), now)
    raise UserError(f"{out}: holds results of another run: {other}. Give another --output_dir.")


def order(task: tuple[str, str]) -> tuple[int, str]:
    """The tables' order; of a benchmark that is no more, last."""
    name, style = task
    return ([*BENCHMARKS, name].index(name), style)


def write(path: Path, results: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}.") from None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "baichuan-sft": __version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
