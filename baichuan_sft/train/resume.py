"""From where a run goes on: the newest checkpoint that all ranks find whole, of the same run.

# U rows of an update, the same before and after, on however many ranks
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from baichuan_sft import commit
from baichuan_sft.errors import CheckpointFault, UserError
from baichuan_sft.train.args import Settings
from baichuan_sft.train.best import ended_early
from baichuan_sft.train.lock import this_launch
from baichuan_sft.train.progress import say
from baichuan_sft.train.same_run import check_names
from baichuan_sft.train.together import gather, place

NEVER, AUTO, NEWEST = "never", "auto", "newest"


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from; every rank has found its files whole."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """run.json of the run that saved it."""
        return json.loads((self.path / "run.json").read_text(encoding="utf-8"))

    @cached_property
    def state(self) -> dict[str, Any]:
        """transformers' own: updates done, and what was logged."""
        return json.loads((self.path / "trainer_state.json").read_text())

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state["global_step"]

    @property
    def rows_per_update(self) -> int:
        return self.facts["rows_per_update"]


# --- what is asked for ------------------------------------------------------------------------------


def check_resume(values: dict[str, Any]) -> None:
    """Bring --resume and --resume_from_checkpoint to one word, in ``values["resume"]``.

    Raises:
        UserError: they contradict each other, name what is not there, or begin anew over another run.
    """
    word, older = values["resume"], values["resume_from_checkpoint"]
    output_dir = values["output_dir"]
    if older is not None and older.lower() != "false":
        if word != NEVER:
            raise UserError(f"--resume {word} and --resume_from_checkpoint {older} are both given; keep one.")
        if older.lower() != "true" and not Path(older).is_dir():
            raise UserError(
                f"--resume_from_checkpoint {older}: no such directory; True takes the newest in output_dir."
            )
        word = NEWEST if older.lower() == "true" else older
    elif word not in (NEVER, AUTO) and not Path(word).is_dir():
        raise UserError(f"--resume {word}: no such directory; possible are auto, never and a checkpoint.")
    found = commit.checkpoints(output_dir)
    # A launch that starts again after a failure repeats its flags, and goes on from what it has saved.
    restarted = this_launch()[1]
    begins_here = word == NEVER and not values["overwrite_output_dir"]
    if restarted and (begins_here or any(_of_this_launch(path) for path in found)):
        word, values["overwrite_output_dir"] = AUTO, False
    values["resume"] = word
    newer = [path.name for path in found if -1 < commit.step_of(word) < commit.step_of(path)]
    if newer and values["allow_change"] and Path(word).resolve().parent == Path(output_dir).resolve():
        raise UserError(
            f"--resume {word} --allow_change {values['allow_change']}: {', '.join(newer)} there went on "
            "without the change, and --resume auto would take them; delete them, or change --output_dir."
        )
    if values["overwrite_output_dir"] and word != NEVER:
        raise UserError(f"--overwrite_output_dir True begins anew, --resume {word} does not; keep one.")
    if word == NEWEST and not found:
        raise UserError(
            f"--resume_from_checkpoint True: no checkpoint-* in {output_dir}; --resume auto begins there."
        )
    elsewhere = word not in (AUTO, NEWEST) and Path(word).resolve().parent != Path(output_dir).resolve()
    if found and elsewhere and not values["overwrite_output_dir"] and not restarted:
        held = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(
            f"--output_dir {output_dir} holds {held} of a run{_described(found[0])}; go on with --resume "
            "auto, begin anew with --overwrite_output_dir True, which removes them, or take another one."
        )
    check_names(values["allow_change"])


def _of_this_launch(checkpoint: Path) -> bool:
    launch, _ = this_launch()
    try:
        facts = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(launch) and facts.get("launch") == launch


def _described(checkpoint: Path) -> str:
    try:
        facts = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        return (
            f" (model {facts['model']['model_name_or_path']}, data {facts['data']['data_path']}, "
            f"seed {facts['training']['seed']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def choose(settings: Settings) -> Resumed | None:
    """The checkpoint to go on from, the same on every rank; None begins anew. Every rank calls it.

    What is not whole on all of them is named and passed over; each rank reads its share of the files.

    Raises:
        CheckpointFault: the one that was asked for is not whole, or none is.
    """
    word = settings.training["resume"]
    if word == NEVER:
        return None
    asked = word not in (AUTO, NEWEST)
    paths = [Path(word)] if asked else commit.checkpoints(settings.training["output_dir"])
    broken: list[str] = []
    chosen = None
    for path in gather(paths)[0]:
        found = faults(path, settings.training["save_on_each_node"])
        if not found:
            chosen = Resumed(path)
            break
        broken.append(f"{path if asked else path.name}: {commit.summary(found)}")
    if chosen is None and (asked or word == NEWEST):
        raise CheckpointFault(f"{'; '.join(broken)}. No other checkpoint is taken.")
    for line in broken:
        say(f"{line}, {f'using {chosen.path.name}' if chosen else 'beginning anew'}")
    if chosen is None:
        return None
    if not (chosen.path / "trainer_state.json").is_file():
        raise UserError(f"--resume {chosen.path}: a result, not a checkpoint; give one of its checkpoint-*.")
    if chosen.facts["training"].get("save_only_model"):
        raise CheckpointFault(f"{chosen.path}: saved with --save_only_model True; nothing can go on from it.")
    say(f"resume: {chosen.path}, update {chosen.step}")
    return chosen


def faults(path: Path, each_node: bool = False) -> list[str]:
    """What any rank finds wrong with a committed directory; every rank calls it.

    Args:
        each_node: every host has a directory of its own, which its own ranks read.
    """
    # Sizes of everything by every rank: a host may not see what another one wrote.
    found = _said_by(gather(commit.problems(path, hashes=False)))
    if found:
        return found
    rank, world_size = place()
    if each_node:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        world_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        rank %= world_size
    files = commit.read_manifest(path)["files"]
    largest_first = sorted(files, key=lambda name: (-files[name]["size"], name))
    return _said_by(gather(commit.problems(path, largest_first[rank::world_size])), shared=True)


def _said_by(everyone: list[list[str]], shared: bool = False) -> list[str]:
    """Each problem once, with the rank where not all of them have it."""
    found: dict[str, str] = {}
    for rank, here in enumerate(everyone):
        for what in here:
            alone = not shared and any(what not in others for others in everyone)
            found.setdefault(what, f"{what} (rank {rank})" if alone else what)
    return list(found.values())


# --- the rows of an update --------------------------------------------------------------------------


def keep_rows(settings: Settings, resumed: Resumed) -> Settings:
    """The settings with as many micro-batches as give the checkpoint's U on today's ranks.

    Raises:
        UserError: --gradient_accumulation_steps is neither what the run began with nor what is needed; or a
            stream was shared out to another number of ranks.
    """
    world_size, rows = place()[1], settings.row_shape()[1]
    total, before = resumed.rows_per_update, resumed.facts
    if settings.data.streaming and before["world_size"] != world_size:
        ranks = before["world_size"]
        raise UserError(
            f"{resumed.path}: saved by {ranks} ranks, and each has its share of the stream; resume with as "
            f"many, as by `deepspeed --num_gpus {ranks} ...`, not with {world_size}."
        )
    needed = math.ceil(total / (world_size * rows))
    asked = settings.training["gradient_accumulation_steps"]
    if asked not in (needed, before["accumulation_asked"]):
        raise UserError(
            f"{resumed.path}: rows per update was {total}, is {world_size * rows * asked}. The rows would "
            f"come in another order; here it is --gradient_accumulation_steps {needed}."
        )
    then = before["world_size"], before["training"]["gradient_accumulation_steps"], before["rows_per_batch"]
    if then != (world_size, needed, rows):
        say(
            f"resume: {total:,} rows per update as before, on {world_size} ranks x {needed} micro-batches of "
            f"up to {rows} rows (was {' x '.join(map(str, then))})"
        )
    return replace(settings, training=settings.training | {"gradient_accumulation_steps": needed})


def something_left(resumed: Resumed, settings: Settings, total: int) -> bool:
    """Whether there is anything to do: an update, or the result that was not saved any more.

    Args:
        total: updates of the whole run.
    Raises:
        UserError: neither, and this very checkpoint was asked for; --resume auto just ends.
    """
    output_dir = Path(settings.training["output_dir"])
    ended = resumed.step >= total or ended_early(resumed.state["log_history"], settings.training)
    if not ended or faults(output_dir, settings.training["save_on_each_node"]):
        return True
    facts = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    source = resumed.path.with_name(facts.get("best", {}).get("checkpoint", resumed.path.name))
    try:
        result, saved = (commit.read_manifest(path)["files"] for path in (output_dir, source))
    except (OSError, ValueError):
        return True
    weights = [name for name in result if name.endswith(".safetensors")]
    if not weights or any(saved.get(name, {}).get("sha256") != result[name]["sha256"] for name in weights):
        return True  # of another run, or of another update
    line = f"{resumed.path}: already at update {resumed.step} of {total}"
    if settings.training["resume"] != AUTO:
        raise UserError(f"{line}, nothing is left to train.")
    say(f"{line}; the result lies in {output_dir}")
    return False


def begin_anew(output_dir: str | Path) -> None:
    """Remove the checkpoints of the run before."""
    for path in commit.checkpoints(output_dir):
        commit.remove(path)
