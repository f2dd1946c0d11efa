"""What a rank is doing, in a file that its launcher reads."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

PHASES = ("start", "data", "rendezvous", "model", "train", "save", "done")

_facts: dict[str, Any] = {"phase": "start", "step": 0, "error": None}


def update(**facts: Any) -> None:
    """Note phase or step, in ``$BAICHUAN_SFT_STATUS/rank-{RANK}.json``; without that variable, nowhere."""
    assert facts.get("phase", "start") in PHASES, facts
    _facts.update(facts)
    directory = os.environ.get("BAICHUAN_SFT_STATUS")
    if not directory:
        return
    rank = int(os.environ.get("RANK", "0"))
    where = {"rank": rank, "local_rank": int(os.environ.get("LOCAL_RANK", "0"))}
    entry = {**where, "host": socket.gethostname(), "pid": os.getpid(), **_facts, "time": time.time()}
    temporary = Path(directory, f".rank-{rank}.tmp")
    try:
        temporary.write_text(json.dumps(entry))
        temporary.replace(Path(directory, f"rank-{rank}.json"))
    except OSError:
        pass  # its launcher is gone, or its disk is full: no reason to lose the run


def fail(error: BaseException, exit_code: int) -> None:
    """Note why this rank ends; the first error stays, what follows from it is not told."""
    if _facts["error"] is None:
        update(
            error={
                "kind": type(error).__name__,
                "message": str(error),
                "traceback": "".join(traceback.format_exception(error)),
                "exit_code": exit_code,
            }
        )


def failed() -> bool:
    return _facts["error"] is not None
