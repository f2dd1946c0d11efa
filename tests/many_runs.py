"""Several training runs in one launch: importing torch and DeepSpeed costs more than a tiny run.

python many_runs.py runs.json, a list of argument lists; every process of the launch calls it.
"""

import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
from accelerate.state import AcceleratorState, GradientState

from baichuan_sft.train.sft import main


def run_all(path: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=300))
    for argv in json.loads(Path(path).read_text()):
        # A run leaves accelerate's view of it behind, which the next one would take for its own.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        main(argv)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_all(next(word for word in sys.argv[1:] if word.endswith(".json")))
