"""kill -9 at random moments of a run: does it go on by itself, and as if nothing had happened?

python benchmarks/crash.py --trials 20 [--contestant hf] [--cases full-zero2,lora-zero2] [--seed 0]

A trial starts a run, kills all its processes, and starts the same command again, once more killed with
probability 1/4, until it ends. Half of the kills come at a moment drawn evenly from the time such a run
takes, reading the data included; half while a checkpoint is being written, or shortly after. It counts as

    identical   the run ended, and the loss of every update equals, bit for bit, that of the undisturbed run
    differs     it ended with another loss
    stuck       a start failed, or did nothing for --limit seconds: a person has to help

Ours starts with `--resume auto`; hf is transformers' own Trainer on the same model, data order of its own,
with `resume_from_checkpoint` True where a checkpoint-* directory exists. Both save every 2 of 12 updates.
Processes are forked from one that has imported everything, so that a start takes a second; nothing in what
is forked knows of the other.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

UPDATES, SAVE_STEPS = 12, 2
RECORDS, WORDS = 40, ("大象", "会", "飞", "吗", "天空", "海", "很", "高", "远", "山")


@dataclass(frozen=True)
class Case:
    """What is trained: flags besides the common ones, architecture of the nano model, processes."""

    flags: tuple[str, ...] = ()
    arch: str = "baichuan2-7b"
    stage: int | None = None
    processes: int = 2


@dataclass(frozen=True)
class Kill:
    """When: seconds after the start, or after a directory has appeared."""

    seconds: float
    after: Path | None = None

    def __str__(self) -> str:
        return f"{self.after.name + ' + ' if self.after else ''}{self.seconds:.2f} s"


LORA = ("--use_lora", "True")
CASES = {
    "full": Case(processes=1),
    "full-zero0": Case(stage=0),
    "full-zero1": Case(stage=1, arch="baichuan2-13b"),
    "full-zero2": Case(stage=2),
    "full-zero3": Case(stage=3, arch="baichuan2-13b"),
    "lora": Case(LORA, processes=1, arch="baichuan2-13b"),
    "lora-zero2": Case(LORA, stage=2),
    "lora-zero3": Case(LORA, stage=3),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--contestant", choices=CONTESTANTS, default="ours")
    parser.add_argument("--cases", help="names with commas between; default all, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=240, help="seconds that one start may take")
    parser.add_argument("--work", help="directory for models and runs; default a temporary one")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    names = args.cases.split(",") if args.cases else list(CASES)
    work = Path(args.work or tempfile.mkdtemp(prefix="crash_"))
    server = Server(work, args.limit)
    try:
        found = [
            trial(CONTESTANTS[args.contestant], server, names[i % len(names)], args.seed + i)
            for i in range(args.trials)
        ]
    finally:
        server.close()
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    counts = {kind: sum(one["result"] == kind for one in found) for kind in ("identical", "differs", "stuck")}
    kills = sum(one["kills"] for one in found)
    print(f"{args.contestant}: {counts['identical']} of {args.trials} identical, {counts}; {kills} kills")
    if args.json:
        Path(args.json).write_text(json.dumps({"counts": counts, "trials": found}, indent=1) + "\n")
    sys.exit(counts["identical"] != args.trials)


# --- the contestants ----------------------------------------------------------------------------------


def ours(work: Path, case: Case, out: Path) -> Callable[[], int]:
    words = [
        *("--model_name_or_path", work / "models" / case.arch, "--data_path", work / "data.json"),
        *(
            "--output_dir",
            out,
            "--max_steps",
            UPDATES,
            "--save_strategy",
            "steps",
            "--save_steps",
            SAVE_STEPS,
        ),
        *("--per_device_train_batch_size", 1, "--model_max_length", 64, "--gradient_accumulation_steps", 2),
        *("--learning_rate", "1e-3", "--use_cpu", "True", "--resume", "auto", "--save_total_limit", 3),
        *("--cache_dir", work / "cache", "--check_reload", "False", *case.flags),
    ]
    if case.stage is not None:
        words += ["--deepspeed", work / f"zero{case.stage}.json"]

    def start() -> int:
        from baichuan_sft.cli import run
        from baichuan_sft.train.sft import main as train

        return run(train, [str(word) for word in words])

    return start


def hf(work: Path, case: Case, out: Path) -> Callable[[], int]:
    """transformers' Trainer as its documentation shows it: no line of ours but the model's code."""

    def start() -> int:
        import torch
        from transformers import Trainer, TrainingArguments

        from baichuan_sft import load_model

        deepspeed = None if case.stage is None else str(work / f"zero{case.stage}.json")
        if deepspeed:
            import deepspeed as engine

            engine.init_distributed("gloo")
        args = TrainingArguments(
            str(out),
            max_steps=UPDATES,
            save_steps=SAVE_STEPS,
            save_total_limit=3,
            logging_steps=1,
            learning_rate=1e-3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            deepspeed=deepspeed,
        )
        ids = torch.randint(5, 300, (RECORDS, 64), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [{"input_ids": row, "labels": row} for row in ids]
        model = load_model(work / "models" / case.arch)
        if LORA[0] in case.flags:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(target_modules=["W_pack"], task_type="CAUSAL_LM"))
        trainer = Trainer(model, args, train_dataset=rows)
        log = out / "losses.jsonl"

        def keep(logs, *rest, **options):
            if "loss" in logs and args.process_index == 0:
                with log.open("a") as file:
                    file.write(json.dumps({"step": trainer.state.global_step, "loss": logs["loss"]}) + "\n")

        trainer.log = keep
        trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")) or None)
        trainer.save_model()
        return 0

    return start


CONTESTANTS = {"ours": ours, "hf": hf}


# --- trials -------------------------------------------------------------------------------------------


def trial(contestant: Callable, server: "Server", name: str, seed: int) -> dict:
    """One run with its kills; a line of the output."""
    case, rng = CASES[name], random.Random(seed)
    expected, seconds, save_seconds = server.undisturbed(contestant, name)
    out = server.work / "runs" / f"{contestant.__name__}-{name}-{seed}"
    kills, result, said = [], "stuck", ""
    while True:
        kill = None
        if not kills or (len(kills) < 3 and rng.random() < 0.25):
            save = rng.randrange(SAVE_STEPS, UPDATES + 1, SAVE_STEPS)
            aimed = Kill(rng.uniform(0, 1.5 * save_seconds), out / f"checkpoint-{save}")
            kill = aimed if rng.random() < 0.5 else Kill(rng.uniform(0, seconds))
        ended, output = server.start(contestant(server.work, case, out), out, case.processes, kill)
        if ended is None and kill is not None:
            kills.append(str(kill))
            continue
        if ended == 0:
            losses = losses_of(out)
            result = "identical" if losses == expected else "differs"
            said = "" if losses == expected else f"{differing(losses, expected)} of {UPDATES} updates differ"
        else:
            said = (output.strip().splitlines() or ["said nothing"])[-1]
        break
    print(
        f"trial {seed:4} {name:11} killed at {', '.join(kills)} of {seconds:.1f} s: {result} {said}",
        flush=True,
    )
    if result == "identical":
        shutil.rmtree(out)
    return {"case": name, "seed": seed, "kills": len(kills), "at": kills, "result": result, "said": said}


def losses_of(out: Path) -> dict[int, set[str]]:
    """The losses written for each update, as exact text: of every time that it was computed."""
    losses: dict[int, set[str]] = {}
    for file in (out / "trainer_log.jsonl", out / "losses.jsonl"):
        for line in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # killed in the middle of the line
                row = json.loads(line)
                if "loss" in row:
                    losses.setdefault(row["step"], set()).add(float(row["loss"]).hex())
    return losses


def differing(losses: dict[int, set[str]], expected: dict[int, set[str]]) -> int:
    return sum(losses.get(step) != expected.get(step) for step in range(1, UPDATES + 1))


class Server:
    """Forks runs from a process that has imported the libraries, and has made models and data."""

    def __init__(self, work: Path, limit: float) -> None:
        self.work, self.limit = work, limit
        self.known: dict[tuple[str, str], tuple[dict, float, float]] = {}
        (work / "runs").mkdir(parents=True, exist_ok=True)
        self._make_inputs()
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        import deepspeed
        import torch

        import baichuan_sft.train.sft
        import baichuan_sft.train.trainer  # noqa: F401

        torch.set_num_threads(1)  # a fork would lose the others
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def _make_inputs(self) -> None:
        rng = random.Random(0)
        talks = [
            {"from": who, "value": "".join(rng.choices(WORDS, k=rng.randint(2, 16)))}
            for _ in range(RECORDS)
            for who in ("human", "gpt")
        ]
        records = [{"id": str(i), "conversations": talks[2 * i : 2 * i + 2]} for i in range(RECORDS)]
        (self.work / "data.json").write_text(json.dumps(records, ensure_ascii=False))
        base = json.loads((ROOT / "ds_config.json").read_text())
        for stage in range(4):
            base["zero_optimization"]["stage"] = stage
            (self.work / f"zero{stage}.json").write_text(json.dumps(base))
        for arch in {case.arch for case in CASES.values()}:
            if not (self.work / "models" / arch).exists():
                command = [sys.executable, ROOT / "scripts" / "make_nano.py", self.work / "models" / arch]
                words = ["--arch", arch, "--hidden_size", "64", "--intermediate_size", "128"]
                subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)

    def undisturbed(self, contestant: Callable, name: str) -> tuple[dict, float, float]:
        """Losses of a run that nobody kills, its seconds from start to end, and those of its longest save."""
        key = (contestant.__name__, name)
        if key not in self.known:
            out, case = self.work / "runs" / f"{contestant.__name__}-{name}", CASES[name]
            shutil.rmtree(out, ignore_errors=True)
            for _ in range(2):  # the first one tokenises
                shutil.rmtree(out, ignore_errors=True)
                began = time.monotonic()
                ended, output = self.start(contestant(self.work, case, out), out, case.processes, None)
                if ended != 0:
                    raise RuntimeError(f"{name}: the undisturbed run ended with {ended}: {output[-2000:]}")
            seconds = time.monotonic() - began
            written = [[file.stat().st_mtime for file in d.iterdir()] for d in out.glob("checkpoint-*")]
            self.known[key] = losses_of(out), seconds, max(max(times) - min(times) for times in written)
            if len(self.known[key][0]) != UPDATES:
                raise RuntimeError(f"{name}: {len(self.known[key][0])} of {UPDATES} updates were logged")
        return self.known[key]

    def start(
        self, run: Callable[[], int], out: Path, processes: int, kill: Kill | None
    ) -> tuple[int | None, str]:
        """One start of a run.

        Returns:
            its exit code, None where it was killed, by us or for taking too long; and what it said.
        """
        from baichuan_sft import machine

        out.mkdir(parents=True, exist_ok=True)
        log = self.work / "runs" / f"{out.name}.log"
        with machine.listen(0) as probe:
            port = probe.getsockname()[1]
        began = time.monotonic()
        ranks = [self._fork(run, rank, processes, port, log) for rank in range(processes)]
        left, code = dict.fromkeys(ranks), 0
        stop = began + (kill.seconds if kill and kill.after is None else self.limit)
        while left and time.monotonic() < stop:
            if kill and kill.after and kill.after.exists():
                stop, kill = min(stop, time.monotonic() + kill.seconds), None
            for pid in list(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del left[pid]
                    code = code or os.waitstatus_to_exitcode(status)
                    if code:  # a launcher would end the others
                        stop = min(stop, time.monotonic() + 15)
            time.sleep(0.002)
        killed = bool(left) and code == 0
        for pid in left:
            for kill_it in (os.kill, os.killpg):  # it may not lead a group yet
                with contextlib.suppress(ProcessLookupError):
                    kill_it(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)
        return (None if killed else code), log.read_text(errors="replace")

    def _fork(self, run: Callable[[], int], rank: int, processes: int, port: int, log: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            file = os.open(
                log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if rank == 0 else os.O_WRONLY | os.O_CREAT
            )
            os.dup2(file, 1)
            os.dup2(file, 2)
            if processes > 1 or "zero" in log.name:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                    LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            code = run()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def close(self) -> None:
        """Nothing of a run is left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


if __name__ == "__main__":
    main()
