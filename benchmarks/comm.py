"""Bytes that one update of the real training path moves between processes, against the formula; gloo, CPU.

python benchmarks/comm.py                                  all runs, 2 and 4 processes (5 minutes)
python benchmarks/comm.py --processes 2 --runs full-2,lora-0 --accumulation 2 --bf16
python benchmarks/comm.py --plot comm.png

Every rank calls ``baichuan_sft.train.sft.main`` on a tiny random model while a dispatch mode sees each c10d
operation, whoever starts it: DeepSpeed, accelerate, or the C++ reducer of DDP. What counts is the difference
between the ends of consecutive updates, so set-up, saving and the first update are left out.

An operation's payload is its larger side (an all-gather's output, a reduce-scatter's input). One of n ranks
sends, by the ring formulas that NCCL follows, payload times

    all-reduce 2 (n-1)/n    reduce-scatter, all-gather, broadcast, reduce (the mean over ranks) (n-1)/n

gloo itself has no reduce-scatter and sends more. Expected for an update of k micro-steps, in bytes of the
dtype that travels, with G gradients of the trained parameters, T these parameters, A all parameters:

    ddp, stage 0    2 G (n-1)/n            gradients all-reduced once, whatever k is
    stage 1         (G + T) (n-1)/n        reduced to the owners once, weights gathered from them
    stage 2         (k G + T) (n-1)/n      DeepSpeed keeps no whole gradient, so it reduces every micro-step
    stage 3         k (2 A + G) (n-1)/n    weights gathered in forward and in backward (of LoRA's frozen
                                           embedding only in forward)

DeepSpeed's stages 1 and 2, on any device, all-reduce each bucket and keep a part of it: 2 G where G would do.
Runs named `owners` set "use_multi_rank_bucket_allreduce": false, which sends each part to its owner only.
With 16-bit weights and gradients and k = 1, stage 2 is then 4 bytes per parameter, and stage 3 is 6.
"""

import argparse
import collections
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WARM_UP = 2  # updates before the first that counts: stage 3 learns its order of gathering in the first
COUNTED = 3
LORA = ["--use_lora", "true", "--lora_rank", "8", "--lora_target", "all-linear"]
# DeepSpeed's stages 1 and 2 all-reduce each bucket and drop what is not theirs, unless told so.
OWNERS = {"use_multi_rank_bucket_allreduce": False}
# A weight used again within 1e9 weights stays gathered: all of a tiny model, next to nothing of a large one.
LARGE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
RUNS = {  # name -> ZeRO stage (None: without DeepSpeed), what goes over zero_optimization, flags
    "full-ddp": (None, {}, []),
    "full-0": (0, {}, []),
    "full-1": (1, {}, []),
    "full-1-owners": (1, OWNERS, []),
    "full-2": (2, {}, []),
    "full-2-owners": (2, OWNERS, []),
    "full-3": (3, LARGE, []),
    "lora-ddp": (None, {}, LORA),
    "lora-0": (0, {}, LORA),
    "lora-2": (2, {}, LORA),
    "lora-2-owners": (2, OWNERS, LORA),
    "lora-3": (3, LARGE, LORA),
}
WIRE = {"allreduce": 2, "reduce_scatter": 1, "allgather": 1, "broadcast": 1, "reduce": 1}  # x (n-1)/n
CONTROL = 64  # bytes; what is no larger says how many targets there are, or whether a number is finite


def formula(stage, facts, processes, accumulation) -> float:
    """Bytes that each rank puts on the wire in one update."""
    gradients = trained = facts["trained"]  # both travel in the weights' dtype
    payload = {
        None: 2 * gradients,
        0: 2 * gradients,
        1: gradients + trained,
        2: accumulation * gradients + trained,
        3: accumulation * (facts["gathered"] + gradients),
    }
    return payload[stage] * (processes - 1) / processes


# --- one rank -------------------------------------------------------------------------------------


def kind_of(operation: str) -> str:
    """``c10d::_allgather_base_`` is an allgather; an operation that nobody foresaw is an error."""
    name = operation.lower().replace("all_", "all").strip("_")
    for kind in ("allreduce", "reduce_scatter", "allgather", "broadcast", "reduce"):
        if name.startswith(kind):
            return kind
    raise ValueError(f"no ring formula for {operation}")


def counting_mode(bytes_of: collections.Counter, calls_of: collections.Counter):
    """A dispatch mode that adds each collective's payload to ``bytes_of[kind, dtype]``."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def size(part):
        return sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor))

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.namespace not in ("c10d", "_c10d_functional"):
                return out
            operation = function._schema.name.split("::")[1]
            if operation not in ("barrier", "wait_tensor", "monitored_barrier_"):
                kind, payload = kind_of(operation), max(map(size, (*args, out)))
                if payload <= CONTROL:
                    kind = f"control:{kind}"
                first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
                key = f"{kind} {str(first.dtype).removeprefix('torch.')}"
                bytes_of[key] += payload
                calls_of[key] += 1
            return out

    return Count()


def worker(plan_path: str) -> None:
    """All runs of a plan in this rank; importing DeepSpeed costs more than a tiny run."""
    import datetime

    import deepspeed
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainerCallback

    from baichuan_sft.train import sft, trainer

    plan = json.loads(Path(plan_path).read_text())
    bytes_of, calls_of = collections.Counter(), collections.Counter()

    class Snapshots(TrainerCallback):
        """The counters after each update, and what the model holds."""

        def __init__(self):
            self.after, self.facts = [], {}

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            sizes = {p: getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters()}
            embedding = model.get_input_embeddings().weight
            frozen = 0 if embedding.requires_grad else sizes[embedding]  # backward ends before it
            self.facts["trained"] = sum(size for p, size in sizes.items() if p.requires_grad)
            self.facts["gathered"] = 2 * sum(sizes.values()) - frozen

        def on_step_end(self, args, state, control, **kwargs):
            self.after.append((dict(bytes_of), dict(calls_of)))

    class CountedTrainer(trainer.SftTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(snapshots)

    trainer.SftTrainer = CountedTrainer
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes to compile, never called
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=300))
    results = {}
    for name, argv in plan["runs"].items():
        # A run leaves accelerate's view of it behind, which the next one would take for its own.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        snapshots = Snapshots()
        with counting_mode(bytes_of, calls_of):
            sft.main(argv)
        after = snapshots.after[WARM_UP - 1 :]
        results[name] = snapshots.facts | {"updates": [minus(b, a) for a, b in zip(after, after[1:])]}
    rank = torch.distributed.get_rank()
    Path(plan["out"], f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def minus(later, earlier) -> dict[str, tuple[int, int]]:
    """What was added in between: kind and dtype -> payload bytes, calls."""
    bytes_of, calls_of = later
    added = {
        key: (value - earlier[0].get(key, 0), calls_of[key] - earlier[1].get(key, 0))
        for key, value in bytes_of.items()
    }
    return {key: value for key, value in added.items() if value[1]}


# --- all ranks ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def flags_of(name: str, directory: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one run, its DeepSpeed file written beside it."""
    stage, zero, extra = RUNS[name]
    values = dict(
        model_name_or_path=directory / "nano",
        data_path=ROOT / "data" / "belle_chat.json",
        output_dir=directory / "out" / name,
        cache_dir=directory / "cache",
        max_steps=WARM_UP + COUNTED,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.accumulation,
        model_max_length=64,
        packing="false",
        save_strategy="no",
        check_reload="false",
        use_cpu="true",
        bf16=str(args.bf16).lower(),
        learning_rate=1e-4,
    )
    if stage is not None:
        config = json.loads((ROOT / "ds_config.json").read_text())
        config["zero_optimization"] |= {"stage": stage, **zero}
        values["deepspeed"] = directory / f"{name}.json"
        values["deepspeed"].write_text(json.dumps(config))
    return [word for key, value in values.items() for word in (f"--{key}", str(value))] + extra


def launch(names: list[str], processes: int, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Name of a run -> what each rank counted."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        shape = [word for key, value in args.shape.items() for word in (f"--{key}", str(value))]
        nano = [sys.executable, ROOT / "scripts" / "make_nano.py", directory / "nano", *shape]
        plan = {"runs": {name: flags_of(name, directory, args) for name in names}, "out": temporary}
        (directory / "plan.json").write_text(json.dumps(plan))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        port = ["--master_port", str(free_port())]
        train = [*torchrun, *port, __file__, "--worker", directory / "plan.json"]
        for command in (nano, train):
            done = subprocess.run(
                list(map(str, command)), env=environment(), capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
        ranks = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: [rank[name] for rank in ranks] for name in names}


def summarise(name: str, ranks: list[dict], args: argparse.Namespace) -> dict:
    """Measured and expected bytes of one run; every update and every rank must agree."""
    processes, facts = len(ranks), ranks[0]
    updates = [update for rank in ranks for update in rank["updates"]]
    assert len(updates) == processes * COUNTED
    steady = all(update == updates[0] for update in updates)
    ring = (processes - 1) / processes
    wire = 0.0
    for key, (payload, _) in updates[0].items():
        wire += WIRE[key.removeprefix("control:").split()[0]] * payload * ring
    expected = formula(RUNS[name][0], facts, processes, args.accumulation)
    return dict(
        run=name,
        processes=processes,
        steady=steady,
        trained=facts["trained"],
        kinds={key: list(value) for key, value in updates[0].items()},
        payload=sum(payload for payload, _ in updates[0].values()),
        wire=wire,
        formula=expected,
        ratio=wire / expected,
    )


def table(rows: list[dict]) -> str:
    head = "| run | processes | trained | on the wire, per rank | formula | ratio | payload by kind (calls) |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        kinds = ", ".join(f"{key} {size:,} ({calls})" for key, (size, calls) in row["kinds"].items())
        sizes = f"{row['trained']:,} | {row['wire']:,.0f} | {row['formula']:,.0f} | {row['ratio']:.3f}"
        lines.append(f"| {row['run']} | {row['processes']} | {sizes} | {kinds} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)))
    places = range(len(rows))
    axes.barh([at - 0.2 for at in places], [row["wire"] for row in rows], 0.4, label="counted")
    axes.barh([at + 0.2 for at in places], [row["formula"] for row in rows], 0.4, label="formula")
    axes.set(xscale="log", xlabel="bytes that a rank sends in one update")
    axes.set_yticks(list(places), [f"{row['run']}, {row['processes']} processes" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--runs", default=",".join(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps of an update")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--plot", help="write a PNG here")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    args.shape = dict(
        hidden_size=args.hidden, intermediate_size=344 * args.hidden // 128, num_hidden_layers=args.layers
    )
    # DDP first: DeepSpeed's settings stay behind in transformers, and a later DDP run would take them.
    names = sorted(args.runs.split(","), key=lambda name: RUNS[name][0] is not None)
    rows = []
    for processes in map(int, args.processes.split(",")):
        results = launch(names, processes, args)
        rows += [summarise(name, results[name], args) for name in names]
        print(f"{processes} processes counted", file=sys.stderr, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)
    dtype = "bf16" if args.bf16 else "fp32"
    print(f"{COUNTED} updates of {args.accumulation} micro-steps after {WARM_UP}, {dtype}; bytes per update")
    print(table(rows))


if __name__ == "__main__":
    main()
