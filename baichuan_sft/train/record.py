"""What a run leaves beside its weights: run.json, trainer_log.jsonl, loss.png."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from baichuan_sft import __version__
from baichuan_sft.train.progress import say, scores_of
from baichuan_sft.train.space import disk_reason

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "accelerate",
    "datasets",
    "sentencepiece",
    "safetensors",
)


MEASURED = ("benchmarks", "held_out_answers")
BLOCKS, BLOCK = 33, 1 << 16  # of a file of weights, bytes


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_digest(path: str | Path) -> str:
    """Of a model's directory: its config, and of each file of weights the name, the size and some blocks.

    Another model differs in most of them; all of 26 GB would be read for minutes at every start.
    """
    digest = hashlib.sha256()
    names = ("config.json", "*.safetensors", "*.bin")
    for file in sorted(found for name in names for found in Path(path).glob(name)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as content:
            for number in range(BLOCKS):
                content.seek(max(0, size * number // (BLOCKS - 1) - BLOCK))
                digest.update(content.read(BLOCK))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "baichuan-sft": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` where files differ; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class RunRecord(TrainerCallback):
    """Collects the facts of a run and writes them; rank 0 only.

    Args:
        output_dir: where trainer_log.jsonl grows.
        facts: arguments, data report, hashes; stored as they are.
    """

    def __init__(self, output_dir: str | Path, facts: dict[str, Any]) -> None:
        self.output_dir = Path(output_dir)
        self.log_failed = False
        self.facts = {**facts, "versions": versions(), "git_commit": git_commit()}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 0:
            (self.output_dir / "trainer_log.jsonl").unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        path = self.output_dir / "trainer_log.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
        except OSError as error:
            if not self.log_failed:  # a run need not end for its log; its saves say more
                say(f"{path}: not written ({disk_reason(error) or error.strerror}), training goes on")
            self.log_failed = True

    def go_on(self, before: dict[str, Any]) -> None:
        """Keep what the resumed run has measured; ``before``: its facts."""
        self.facts |= {name: before[name] for name in MEASURED if name in before}

    def write(self, directory: str | Path) -> None:
        text = json.dumps(self.facts, indent=1, ensure_ascii=False, default=str)
        (Path(directory) / "run.json").write_text(text + "\n", encoding="utf-8")


def plot_loss(history: list[dict[str, float]], path: str | Path) -> None:
    """Loss, gradient norm and loss on held-out data over the updates, below them benchmarks, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in history if "loss" in row]
    steps = [row["step"] for row in rows]
    scored = {row["step"]: scores_of(row) for row in history if scores_of(row)}
    size: dict[str, Any] = dict(figsize=(7, 7), height_ratios=(4, 3)) if scored else dict(figsize=(7, 4))
    figure, panels = plt.subplots(1 + bool(scored), squeeze=False, layout="constrained", **size)
    axes, *below = panels[:, 0]
    axes.plot(steps, [row["loss"] for row in rows], color="tab:blue", label="loss")
    held_out = [row for row in history if "eval_loss" in row]
    if held_out:
        axes.plot(
            [row["step"] for row in held_out],
            [row["eval_loss"] for row in held_out],
            color="tab:green",
            marker="o",
            label="held out",
        )
        axes.legend()
    axes.set(xlabel="update", ylabel="loss (nats per target token)", title="training loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    norms = axes.twinx()
    norms.plot(
        steps, [row.get("grad_norm", float("nan")) for row in rows], color="tab:orange", alpha=0.5, lw=1
    )
    norms.set_ylabel("gradient norm", color="tab:orange")
    norms.set_ylim(bottom=0)
    for panel in below:
        plot_scores(panel, scored)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scores(axes: Any, scored: dict[float, dict[str, tuple[float, float, float]]]) -> None:
    """Each benchmark's score and interval over the updates."""
    for name in dict.fromkeys(name for scores in scored.values() for name in scores):
        steps = [step for step in scored if name in scored[step]]
        value, low, high = zip(*(scored[step][name] for step in steps))
        axes.plot(steps, value, marker="o", label=name)
        axes.fill_between(steps, low, high, alpha=0.15)
    axes.set(xlabel="update", ylabel="score (%; BLEU)", title="parts of benchmarks, 95 % intervals")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
