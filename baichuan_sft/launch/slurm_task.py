"""One rank under srun: SLURM's variables become torch's, then its command takes this process over."""

from __future__ import annotations

import os
import sys

# what torch reads -> what SLURM sets for each task
NAMES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def main(command: list[str]) -> None:
    environment = {name: os.environ[theirs] for name, theirs in NAMES.items()}
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, **environment})


if __name__ == "__main__":
    main(sys.argv[1:])
