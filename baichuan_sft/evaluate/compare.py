"""Before and after: what two evaluations of the same items say of two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError
from baichuan_sft.evaluate.items import Item, Outcome

FORMAT = 1
# Of a run's identity: what may differ between the two, and is said where it does.
TOLD = ("dtype", "quantization", "chat", "samples", "max_length")


def read(directory: str | Path) -> dict[str, Any]:
    """results.json of an evaluation.

    Raises:
        UserError: there is none, or it is not one.
    """
    path = Path(directory, "results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory}: no results.json; give the --output_dir of `baichuan-sft eval` that has ended."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None
    if not (isinstance(results, dict) and results.get("format") == FORMAT and "tasks" in results):
        raise UserError(f"{path}: not results of format {FORMAT}; run `baichuan-sft eval` again.")
    return results


def rows(directory: str | Path, benchmark: str, style: str) -> tuple[dict[str, Any], dict[str, dict]]:
    """Identity of the run and id -> line of each item of one task.

    Raises:
        UserError: the file is absent or not whole.
    """
    path = Path(directory, "items", f"{benchmark}.{style}.jsonl")
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            identity: dict[str, Any] = json.loads(next(file, "{}"))
            found: dict[str, dict] = {}
            for number, line in enumerate(file, 2):  # noqa: B007 (for the message)
                row = json.loads(line)
                found[row["id"]] = row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing to compare item by item.") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}:{number}: not a line of an item; run that evaluation again.") from None
    return identity, found


def verdicts(after_dir: str | Path, before_dir: str | Path) -> list[dict[str, Any]]:
    """What became of each task that both evaluations have, by a paired test over the items both asked.

    Returns:
        per task a dict: benchmark, style, before, after (percent or BLEU), items, verdict,
        difference, p, wins, losses, note; where the two cannot be compared a line "error" and verdict None.
    Raises:
        UserError: one of the two has no results, or they share no task.
    """
    after, before = (
        {(task["benchmark"], task["style"]): task for task in read(directory)["tasks"]}
        for directory in (after_dir, before_dir)
    )
    shared = [task for task in after if task in before]
    if not shared:
        names = ["/".join(task) for task in before]
        raise UserError(
            f"{after_dir} and {before_dir} share no task; the latter has {', '.join(names) or 'none'}."
        )
    found = []
    for benchmark, style in shared:
        tasks = after[benchmark, style], before[benchmark, style]
        verdict = {
            "benchmark": benchmark,
            "style": style,
            "before": tasks[1]["value"],
            "after": tasks[0]["value"],
        }
        try:
            verdict |= _verdict(benchmark, style, (after_dir, before_dir), tasks)
        except UserError as error:  # the other tasks can still be compared
            verdict |= {"verdict": None, "error": str(error)}
        found.append(verdict)
    return found


def _verdict(benchmark: str, style: str, directories: tuple, tasks: tuple[dict, dict]) -> dict[str, Any]:
    from baichuan_sft.evaluate.benchmarks import BENCHMARKS
    from baichuan_sft.evaluate.scores import paired, summary

    what = f"{benchmark}.{style}"
    for directory, task in zip(directories, tasks):
        if task["error"]:
            raise UserError(f"{what}: has no result in {directory}: {task['error']}")
    if tasks[0]["data_sha256"] != tasks[1]["data_sha256"]:
        told = [f"{task['data_sha256'][:12]} in {where}" for where, task in zip(directories, tasks)]
        raise UserError(f"{what}: other data, sha256 {' and '.join(told)}; run both on the same --data_dir.")
    (identity, after), (identity_before, before) = (rows(where, benchmark, style) for where in directories)
    ids = [name for name in after if name in before]
    if not ids:
        raise UserError(f"{what}: the two asked no item in common; give both the same --limit and --seed.")
    other = [name for name in ids if after[name]["prompt_sha256"] != before[name]["prompt_sha256"]]
    if other:
        names = ("shots", "seed", "version", "max_length", "chat")
        settings = _differences(identity_before, identity, names) or "no setting that is written down"
        raise UserError(
            f"{what}: other prompts for {len(other)} of {len(ids)} items, first {other[0]} ({settings}); "
            "run both with the same --shots and --seed."
        )
    items = [Item(name, "", after[name]["gold"]) for name in ids]
    outcomes = [
        [Outcome(side[name]["prediction"], side[name]["score"], side[name]["detail"]) for name in ids]
        for side in (before, after)
    ]
    result = paired(BENCHMARKS[benchmark], items, *outcomes)
    found = {name: getattr(result, name) for name in ("verdict", "difference", "p", "wins", "losses")}
    notes = [_differences(identity_before, identity, TOLD)]
    if alone := len(after) + len(before) - 2 * len(ids):
        notes.append(f"{alone} items asked of one model only are left out")
        values = [summary(BENCHMARKS[benchmark], items, side).value for side in outcomes]
        found |= dict(zip(("before", "after"), values))
    return {**found, "items": len(ids), "note": "; ".join(filter(None, notes))}


def _differences(before: dict[str, Any], after: dict[str, Any], names: tuple[str, ...]) -> str:
    """``chat False, now True``"""
    unequal = [name for name in names if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)}, now {after.get(name)}" for name in unequal)
