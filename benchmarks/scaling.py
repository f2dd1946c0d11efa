"""Time and memory of one training step against sequence length, rows, vocabulary and layers, as curves.

python benchmarks/scaling.py --plot scaling.png                          everything (10 minutes or more)
python benchmarks/scaling.py --sweeps "sequence length" --points 512,2048,8192
python benchmarks/scaling.py --quick                                     small, to see that it works

A step is forward and backward of a small model of the family, NormHead, fp32, 75 % of the tokens targets.

    segments, packed    rows of conversations of about 500 tokens, attention conversation by conversation
    segments, one       one conversation fills the row
    sdpa, packed        the same packed rows with torch's attention, which needs a dense T x T mask

Every point is a process of its own, forked from one that has imported everything and computed nothing.
CPU-seconds: the best of some steps. Saved: bytes of all storages that forward keeps for backward, weights
excepted, counted by saved_tensors_hooks, exact. Peak: growth of resident memory from before the step.
The exponent of y ~ x**e is fitted to all points of a curve; `at the end` is that of its last two points,
where what does not grow with x weighs least.
"""

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import baichuan_sft.attention  # noqa: F401  (registers "segments")
from baichuan_sft import BaichuanConfig, BaichuanForCausalLM

CONTESTANTS = {  # name -> attention, whether a row holds many conversations
    "segments, packed": ("segments", True),
    "segments, one": ("segments", False),
    "sdpa, packed": ("sdpa", True),
}
CONVERSATION = (400, 600)  # tokens
SWEEPS = {  # name -> points; the rest stays at BASE
    "sequence length": [512, 1024, 2048, 4096, 8192, 16384],
    "rows": [1, 2, 4, 8],
    "vocabulary": [8192, 16384, 32768, 65536, 131072],
    "layers": [1, 2, 4, 8],
}
QUICK = {"sequence length": [512, 1024, 2048], "rows": [1, 2], "vocabulary": [4096, 8192], "layers": [1, 2]}
BASE = {"sequence length": 1024, "rows": 1, "vocabulary": 4096, "layers": 2}
SHAPE = dict(hidden_size=256, intermediate_size=688, num_attention_heads=4)
# Bytes of one ALiBi mask (heads x T x T x 4); several live at a time while it is made.
MAX_MASK_BYTES = 2**30
MEASURES = {"cpu_seconds": "CPU s", "saved_mib": "saved MiB", "peak_mib": "peak MiB"}


def positions(num_tokens: int, packed: bool) -> torch.Tensor:
    """``(1, T)``; each conversation of a packed row starts at 0 again."""
    if not packed:
        return torch.arange(num_tokens)[None]
    rng, parts, left = np.random.default_rng(0), [], num_tokens
    while left:
        parts.append(torch.arange(min(left, int(rng.integers(*CONVERSATION)))))
        left -= len(parts[-1])
    return torch.cat(parts)[None]


def step(model, batch) -> int:
    """Forward and backward; bytes kept in between, each storage once, weights excepted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()  # alive until backward, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(kept.values())


def measure(contestant: str, position: str, point: dict[str, int]) -> dict[str, float]:
    """One point of a curve, in a process that has measured nothing else."""
    attention, packed = CONTESTANTS[contestant]
    torch.manual_seed(0)
    tokens, rows = point["sequence length"], point["rows"]
    limit = {"max_position_embeddings" if position == "rope" else "model_max_length": tokens}
    config = BaichuanConfig(
        vocab_size=point["vocabulary"],
        num_hidden_layers=point["layers"],
        lm_head="norm",
        attn_implementation=attention,
        **limit,
        **SHAPE,
    )
    model = BaichuanForCausalLM(config).train()
    assert config.position_embedding == position and config._attn_implementation == attention
    ids = torch.randint(3, point["vocabulary"], (rows, tokens))
    labels = torch.where(torch.rand(rows, tokens) < 0.75, ids, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions(tokens, packed).repeat(rows, 1)}
    step(model, {name: tensor[:1, :16] for name, tensor in batch.items()})  # what is set up at first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, spent, walls = [], 0.0, []
    while len(seconds) < 5 and spent < 1:
        wall, started = time.perf_counter(), time.process_time()
        saved = step(model, batch)
        seconds.append(time.process_time() - started)
        walls.append(time.perf_counter() - wall)
        if len(seconds) == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        spent += seconds[-1]
    return {
        "cpu_seconds": min(seconds),
        "wall_seconds": min(walls),
        "saved_mib": saved / 2**20,
        "peak_mib": peak / 2**10,
    }


def send(connection, *what) -> None:
    connection.send(measure(*what))


def measure_apart(*what) -> dict[str, float]:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=send, args=(theirs, *what))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"{what}: the process ended with code {child.exitcode}") from None
    finally:
        child.join()


def curve(contestant: str, position: str, sweep: str, points: list[int]) -> dict:
    """Measures at each point and their exponents; points whose dense mask would not fit are left out."""
    xs, results = [], []
    for x in points:
        point = BASE | {sweep: x}
        wide = position == "alibi" and contestant == "sdpa, packed"
        mask = SHAPE["num_attention_heads"] * point["sequence length"] ** 2 * point["rows"] * 4
        if wide and mask > MAX_MASK_BYTES:
            print(f"{contestant}, {position}, {sweep} {x:,}: its mask needs {mask:,} B", file=sys.stderr)
            break
        xs.append(x)
        results.append(measure_apart(contestant, position, point))
    measures = {name: [result[name] for result in results] for name in (*MEASURES, "wall_seconds")}
    exponents = {name: exponent(xs, measures[name]) for name in MEASURES}
    last = {name: exponent(xs[-2:], measures[name][-2:]) for name in MEASURES}
    return dict(
        contestant=contestant,
        position=position,
        sweep=sweep,
        points=xs,
        exponents=exponents,
        last=last,
        **measures,
    )


def exponent(xs: list[int], ys: list[float]) -> float:
    """Least-squares slope of log y over log x; nan where there is no line."""
    if len(xs) < 2 or min(ys) <= 0:
        return math.nan
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def table(curves: list[dict]) -> str:
    names = [f"{label} | exponent (at the end)" for label in MEASURES.values()]
    head = ["| sweep | contestant | from - to", *names, "wall s |"]
    lines = [" | ".join(head), "|---" * 10 + "|"]
    for one in curves:
        cells = [one["sweep"], f"{one['contestant']}, {one['position']}"]
        cells.append(f"{one['points'][0]:,} - {one['points'][-1]:,}")
        for name in MEASURES:
            first, last = one[name][0], one[name][-1]
            cells.append(f"{first:,.3g} - {last:,.4g}")
            cells.append(f"{one['exponents'][name]:.2f} ({one['last'][name]:.2f})")
        cells.append(f"{one['wall_seconds'][0]:.2f} - {one['wall_seconds'][-1]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    sweeps = list(dict.fromkeys(one["sweep"] for one in curves))
    figure, axes = plt.subplots(2, len(sweeps), figsize=(4.2 * len(sweeps), 7.5), squeeze=False)
    colours = dict(zip(CONTESTANTS, ("tab:blue", "tab:green", "tab:red")))
    for one in curves:
        column = axes[:, sweeps.index(one["sweep"])]
        for axis, measure_name in zip(column, ("cpu_seconds", "peak_mib")):
            label = f"{one['contestant']}, {one['position']}: {one['exponents'][measure_name]:.2f}"
            style = dict(color=colours[one["contestant"]], marker="o", markersize=3)
            line = "-" if one["position"] == "rope" else "--"
            axis.plot(one["points"], one[measure_name], line, label=label, **style)
            if measure_name == "peak_mib":
                axis.plot(one["points"], one["saved_mib"], ":", alpha=0.6, **style)
            axis.set(xscale="log", yscale="log", xlabel=one["sweep"], ylabel=MEASURES[measure_name])
            axis.set_xticks(one["points"], [f"{x:,}" for x in one["points"]], fontsize=7)
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.legend(fontsize=6)
            axis.grid(alpha=0.3)
    figure.suptitle(
        "solid: RoPE, dashed: ALiBi, dotted: bytes saved for backward; legends: exponents", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--points", help="of one sweep, instead of its own: 512,2048")
    parser.add_argument("--contestants", default=";".join(CONTESTANTS), help="separated by ;")
    parser.add_argument("--position", default="rope,alibi")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", help="write a PNG here")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    sweeps = args.sweeps.split(",")
    if args.points and len(sweeps) != 1:
        parser.error("--points needs one sweep in --sweeps")
    torch.set_num_threads(1)  # a fork would not take a thread pool along
    curves = []
    for sweep in sweeps:
        own = (QUICK if args.quick else SWEEPS)[sweep]
        points = [int(x) for x in args.points.split(",")] if args.points else own
        for position in args.position.split(","):
            for contestant in args.contestants.split(";"):
                curves.append(curve(contestant, position, sweep, points))
                print(f"{sweep}: {contestant}, {position}", file=sys.stderr, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(curves, indent=1))
    if args.plot:
        plot(curves, args.plot)
    print(table(curves))


if __name__ == "__main__":
    main()
