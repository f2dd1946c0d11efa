"""What saving costs: the time that a run loses to each checkpoint, and from a start to its first update.

python benchmarks/saving.py [--updates 36] [--save_steps 6] [--repeats 3]

One process, a model of 21 M parameters (checkpoints of about 265 MB: weights and Adam's state in fp32), the
same shapes for both. Between the first update's begin and the last one's, what is more than so many median
updates was lost to the saves in between, hashing beside training included. hf is transformers' own Trainer.
Checkpoints go to --work, which should lie on the disk that is meant.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOKENS, ROWS = 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--updates", type=int, default=36)
    parser.add_argument("--save_steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", help="directory for model and checkpoints; default a temporary one")
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, out = args.one
        return one(name, args.updates, args.save_steps, Path(args.work), Path(out))
    with tempfile.TemporaryDirectory(prefix="saving_") as temporary:
        work = Path(args.work or temporary)
        make_inputs(work)
        for name in CONTESTANTS:
            measure(name, args, work)


def make_inputs(work: Path) -> None:
    shape = ("--hidden_size", "512", "--intermediate_size", "1376", "--num_hidden_layers", "5")
    command = [sys.executable, ROOT / "scripts" / "make_nano.py", work / "model", *shape]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    talk = [{"from": "human", "value": "大象会飞吗"}, {"from": "gpt", "value": "天空很高，海很远。" * 60}]
    records = [{"id": str(i), "conversations": talk} for i in range(64)]
    (work / "data.json").write_text(json.dumps(records, ensure_ascii=False))


def measure(name: str, args: argparse.Namespace, work: Path) -> None:
    lost, steps, resumes = [], [], []
    for repeat in range(args.repeats):
        out = work / f"{name}-{repeat}"
        began, begins = run(name, args.updates, args, work, out)
        steps.append(statistics.median(after - before for before, after in pairwise(begins)))
        saves = (args.updates - 1) // args.save_steps
        lost.append((begins[-1] - begins[0] - (args.updates - 1) * steps[-1]) / saves)
        began, begins = run(name, args.updates + 1, args, work, out)
        resumes.append(begins[0] - began)
    size = sum(file.stat().st_size for file in newest(work / f"{name}-0").rglob("*") if file.is_file())
    each, step = statistics.median(lost), statistics.median(steps)
    print(
        f"{name}: checkpoint {size / 1e6:.0f} MB, update {step:.2f} s, "
        f"lost per save {each:.2f} s ({min(lost):.2f} to {max(lost):.2f}), "
        f"{each / (each + args.save_steps * step):.1%} of the time at one every {args.save_steps} updates; "
        f"from the start to the first update of a resumed run {statistics.median(resumes):.1f} s",
        flush=True,
    )


def newest(out: Path) -> Path:
    return max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def run(
    name: str, updates: int, args: argparse.Namespace, work: Path, out: Path
) -> tuple[float, list[float]]:
    """One process: when it was started, and when each of its updates began."""
    words = ["--updates", updates, "--save_steps", args.save_steps, "--work", work, "--one", name, out]
    began = time.time()
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return began, json.loads((out / "begins.json").read_text())


def one(name: str, updates: int, save_steps: int, work: Path, out: Path) -> None:
    from transformers.trainer_callback import CallbackHandler

    begins: list[float] = []
    on_step_begin = CallbackHandler.on_step_begin

    def timed(self, *rest):
        begins.append(time.time())
        return on_step_begin(self, *rest)

    CallbackHandler.on_step_begin = timed
    code = CONTESTANTS[name](updates, save_steps, work, out)
    (out / "begins.json").write_text(json.dumps(begins))
    sys.exit(code)


def ours(updates: int, save_steps: int, work: Path, out: Path) -> int:
    from baichuan_sft.cli import run as call
    from baichuan_sft.train.sft import main as train

    options = dict(
        model_name_or_path=work / "model",
        data_path=work / "data.json",
        cache_dir=work / "cache",
        output_dir=out,
        max_steps=updates,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=3,
        per_device_train_batch_size=ROWS,
        model_max_length=TOKENS,
        use_cpu=True,
        resume="auto",
        allow_change="max_steps",
        check_reload=False,
    )
    return call(train, [word for name, value in options.items() for word in (f"--{name}", str(value))])


def hf(updates: int, save_steps: int, work: Path, out: Path) -> int:
    import torch
    from transformers import Trainer, TrainingArguments

    from baichuan_sft import load_model

    args = TrainingArguments(
        str(out),
        max_steps=updates,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=3,
        per_device_train_batch_size=ROWS,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    ids = torch.randint(5, 300, (64, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(load_model(work / "model"), args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")) or None)
    return 0


CONTESTANTS = {"ours": ours, "hf": hf}

if __name__ == "__main__":
    main()
