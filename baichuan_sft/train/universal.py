"""ZeRO's optimizer on another number of ranks, through DeepSpeed's universal checkpoint."""

from __future__ import annotations

import contextlib
import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from baichuan_sft import machine
from baichuan_sft.errors import CheckpointFault, EnvironmentFault, UserError
from baichuan_sft.train.progress import say
from baichuan_sft.train.resume import Resumed
from baichuan_sft.train.together import gather, place, together

PATIENCE = 20  # seconds after which waiting ranks hear that the first one still works: below any time limit


def zero_facts(args: Any) -> dict[str, Any] | None:
    """What in the DeepSpeed file decides results; each stage keeps its optimizer in another way."""
    if not args.deepspeed:
        return None
    config = args.hf_deepspeed_config.config
    parts = {name: config[name] for name in ("optimizer", "scheduler") if name in config}
    # A copy, as DeepSpeed goes on filling it in.
    return copy.deepcopy({"stage": config.get("zero_optimization", {}).get("stage", 0)} | parts)


def checkpoint_for(resumed: Resumed, args: Any) -> Path:
    """What to load: the checkpoint or, where its optimizer must be cut anew, what that gave.

    Every rank calls it.

    Raises:
        UserError: it cannot be cut anew, as its states are in 8 bits.
    """
    ranks, optim = resumed.facts["world_size"], getattr(args.optim, "value", args.optim)
    if args.should_save:
        clear(args.output_dir)
    if place()[1] == ranks or not any(resumed.path.glob("global_step*/*_optim_states.pt")):
        return resumed.path
    if "bit" in optim:
        raise UserError(
            f"{resumed.path}: saved by {ranks} ranks, and --optim {optim} cannot be shared out anew; resume "
            f"with {ranks} ranks, as by `deepspeed --num_gpus {ranks} ...`."
        )
    args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    return convert(resumed, Path(args.output_dir, f"universal-{resumed.step}"))


def convert(resumed: Resumed, target: Path) -> Path:
    """Let rank 0 cut the checkpoint anew, outside of it; every rank calls it.

    Returns:
        ``target``, to load in the checkpoint's stead and to ``clear`` then.
    Raises:
        EnvironmentFault: the disk is too small for it.
        CheckpointFault: DeepSpeed's conversion ended with an error.
    """
    tag = (resumed.path / "latest").read_text().strip()
    folders = ["--input_folder", str(resumed.path / tag), "--output_folder", str(target / f"{tag}_universal")]
    # One worker each: more would take as many times the memory.
    folders += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders]
    log = target.with_name(f"{target.name}.log")
    together(_prepare, resumed, target)
    say(f"resume: {resumed.path}, saved by {resumed.facts['world_size']} ranks, is cut anew for {place()[1]}")
    running = None
    if place()[0] == 0:
        with open(log, "wb") as out:
            running = subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, preexec_fn=machine.die_with_parent
            )
    if code := _wait(running):
        raise CheckpointFault(
            f"{resumed.path}: cannot be cut anew, exit code {code}, see {log} and `{' '.join(words)}`; "
            f"resume with {resumed.facts['world_size']} ranks, or start anew."
        )
    if place()[0] == 0:
        log.unlink()
        for name in ("trainer_state.json", "scheduler.json"):  # what transformers reads beside the optimizer
            shutil.copy2(resumed.path / name, target)
    gather(None)
    return target


def _prepare(resumed: Resumed, target: Path) -> None:
    if place()[0]:
        return
    target.mkdir()
    parts = sum(file.stat().st_size for file in resumed.path.glob("global_step*/*_optim_states.pt"))
    free = shutil.disk_usage(target).free
    if free < 2 * parts:  # the pieces, and what they are joined to
        raise EnvironmentFault(
            f"{target}: to cut {resumed.path} anew needs {2 * parts / 1e9:.3g} GB, {free / 1e9:.3g} are "
            f"free; free some, or resume with {resumed.facts['world_size']} ranks."
        )


def _wait(running: subprocess.Popen | None) -> int:
    """Its exit code, on every rank."""
    code: int | None = None
    try:
        while code is None:
            if running is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = running.wait(PATIENCE)
            code = gather(code)[0]
    finally:
        if running is not None and code is None:  # it would write on into what the next run removes
            running.kill()
            running.wait()
    return code


def clear(output_dir: str | Path) -> None:
    """Remove what conversions have left; rank 0 calls it."""
    for path in Path(output_dir).glob("universal-*"):
        if not path.name.removeprefix("universal-").removesuffix(".log").isdigit():
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
