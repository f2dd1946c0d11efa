"""DeepSpeed's save, of which no rank may leave early: the others would wait for it inside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def shielded(engine: Any, attempt: Callable[..., Any], leads: bool) -> Iterator[None]:
    """Inside, what writes files is called by ``attempt``, which keeps an error until all ranks are out.

    DeepSpeed also writes `latest` before all ranks have written their shards; here that comes after them.

    Args:
        engine: DeepSpeed's, or None where there is none. leads: this rank writes what is there once.
    """
    if engine is None:
        yield
        return
    writers = [(engine.checkpoint_engine, "save"), (engine.checkpoint_engine, "makedirs")]
    writers.append((engine, "_copy_recovery_script"))
    plain = engine.save_checkpoint

    @functools.wraps(plain)
    def save_checkpoint(save_dir, *args, **kwargs):
        plain(save_dir, *args, **kwargs, save_latest=False)
        if leads:
            attempt(Path(save_dir, "latest").write_text, f"global_step{engine.global_steps}")

    try:
        for owner, name in writers:
            setattr(owner, name, functools.partial(attempt, getattr(owner, name)))
        engine.save_checkpoint = save_checkpoint
        yield
    finally:
        for owner, name in [*writers, (engine, "save_checkpoint")]:
            vars(owner).pop(name, None)  # the class has the plain one
