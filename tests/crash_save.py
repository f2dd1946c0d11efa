"""Train, and at the second save try it many times over, each time with another mishap; for test_saving.py.

    LD_PRELOAD=crashpoint.so python tests/crash_save.py RESULTS.json STRIDE train-flags...

The process forks for each try, so torch is imported once. Afterwards the directory is as before the save.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

from baichuan_sft import commit
from baichuan_sft.checkpoint import load_model
from baichuan_sft.train import sft
from baichuan_sft.train.trainer import SftTrainer

CRASH = ctypes.CDLL(None)
CRASH.crash_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_long]
CRASH.crash_count.restype = ctypes.c_long
FULL_DISKS = 50
save = SftTrainer._save_checkpoint


class Trials:
    def __init__(self, trainer, args, stride):
        self.trainer, self.args, self.stride = trainer, args, stride
        self.root = Path(trainer.args.output_dir)
        self.before = self.root.with_name("before")
        shutil.copytree(self.root, self.before)

    def restore(self):
        shutil.rmtree(self.root)
        shutil.copytree(self.before, self.root, copy_function=os.link)

    def attempt(self, kill_at=0, power_cut=0, full_after=-1):
        """One save in a child: how it ended, and what is there afterwards."""
        answer = self.root.with_name("answer.json")
        answer.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            CRASH.crash_arm(str(self.root).encode(), kill_at, power_cut, full_after)
            save(self.trainer, *self.args)
            self.trainer.finish_save()
            facts = {"calls": CRASH.crash_count(), "failed": self.trainer.failed_saves}
            answer.write_text(json.dumps(facts))
            sys.stdout.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        facts = json.loads(answer.read_text()) if answer.exists() else {}
        chosen, lines = commit.newest_valid(self.root)
        if chosen is not None:
            load_model(chosen)
        left = [path.name for path in commit.checkpoints(self.root)]
        self.restore()
        name = None if chosen is None else chosen.name
        return {**facts, "status": status, "chosen": name, "lines": lines, "left": left}

    def run(self):
        whole = self.attempt()
        calls = whole["calls"]
        size = sum(
            path.stat().st_size for path in (self.before / "checkpoint-2").rglob("*") if path.is_file()
        )
        points = range(1, calls + 1, self.stride)
        return {
            "whole": whole,
            "kill": [self.attempt(kill_at=at) for at in points],
            "power_cut": [self.attempt(kill_at=at, power_cut=1) for at in points],
            "full": [self.attempt(full_after=size * part // FULL_DISKS) for part in range(FULL_DISKS)],
        }


def save_or_try(self, *args):
    if self.state.global_step == 4:
        self.finish_save()
        results = Trials(self, args, int(sys.argv[2])).run()
        Path(sys.argv[1]).write_text(json.dumps(results))
    save(self, *args)


if __name__ == "__main__":
    SftTrainer._save_checkpoint = save_or_try
    sys.exit(sft.main(sys.argv[3:]))
