"""What `deepspeed` launches: `baichuan-sft train` under the name of the vendor's script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from baichuan_sft.cli import run
from baichuan_sft.train.sft import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
