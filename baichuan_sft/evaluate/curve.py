"""How benchmarks grow with the tokens a model was trained on: a table and a plot over checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from baichuan_sft.commit import write_synced
from baichuan_sft.data.texts import plain
from baichuan_sft.evaluate import plots, published
from baichuan_sft.evaluate.benchmarks import DOMAINS
from baichuan_sft.evaluate.report import interval, markdown_table

# "train_00220B": what the vendor calls the revisions of Baichuan2-7B-Intermediate-Checkpoints.
_REVISION = re.compile(r"(?:^|[^a-z0-9])train_(\d+)B$", re.IGNORECASE)


def trained_tokens(path_or_revision: str | Path) -> float | None:
    """Tokens that a model has seen: in the vendor's training, by its name; in ours, by what the run wrote.

    A run's own count is its tokens per epoch times the epochs done. None where nothing says it.
    """
    text = str(path_or_revision)
    if match := _REVISION.search(text):
        return int(match.group(1)) * 1e9
    own = _of_run(Path(text))
    return own if own is not None else published.TRAINED_TOKENS.get(Path(text).name)


def _of_run(path: Path) -> float | None:
    try:
        state = path / "trainer_state.json"
        if state.is_file():
            epoch = json.loads(state.read_text(encoding="utf-8"))["epoch"]
        else:  # where the run ended
            lines = (path / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
            epoch = json.loads(lines[-1])["epoch"]
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return float(epoch) * record["data"]["report"]["tokens"]
    except (OSError, ValueError, TypeError, LookupError):  # a model of another making
        return None


def tokens_text(tokens: float | None) -> str:
    """``220B``, ``2.64T``, ``1,951``."""
    if tokens is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:,.0f}"


def write(out: str | Path, points: list[tuple[str, dict[str, Any]]]) -> str:
    """Write curve.md and curve.png, the models in order of their tokens.

    Args:
        points: label and results.json of each model. Where one of them does not say its tokens, or some
            count the vendor's training and some their own run alone, all stand in the order given, at equal
            distances.
    Returns:
        the table in Markdown.
    """
    found = [(label, tokens_of(label, results["model"]), results) for label, results in points]
    own = {_of_run(Path(str(results["model"]["path"]))) is not None for _, _, results in found}
    known = len(own) == 1 and all(tokens is not None for _, tokens, _ in found)
    if known:
        found.sort(key=lambda point: point[1] or 0)
    rows = [{f"{t['benchmark']} ({t['style']})": t for t in results["tasks"]} for _, _, results in found]
    domains: dict[str, dict[str, list]] = {}
    names = [name for domain in DOMAINS.values() for name in domain]
    columns = sorted(
        {column for row in rows for column in row}, key=lambda c: (names.index(c.split(" ")[0]), c)
    )
    for column in columns:
        for place, ((_, tokens, _), row) in enumerate(zip(found, rows)):
            if column in row and row[column]["value"] is not None:
                tasks = domains.setdefault(row[column]["domain"], {})
                tasks.setdefault(column, []).append((tokens if known else place, row[column]))
    cells = [
        [plain(label), tokens_text(tokens), *(interval(row[c]) if c in row else "-" for c in columns)]
        for (label, tokens, _), row in zip(found, rows)
    ]
    table = markdown_table(["model", "trained tokens", *columns], cells)
    write_synced(Path(out, "curve.md"), f"# Over trained tokens\n\n{table}\n")
    if domains:
        plots.curve(
            Path(out, "curve.png"), domains, tokens_text if known else [label for label, _, _ in found]
        )
    return table


def tokens_of(label: str, model: dict[str, Any]) -> float | None:
    places = [model.get("revision"), model.get("path"), label]
    return next((n for place in places if place and (n := trained_tokens(place)) is not None), None)
