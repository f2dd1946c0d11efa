"""Contestants that take turns in one process: their times, ratios with spread, a table and a plot.

What else runs on the machine slows all of them alike, so ratios of one round say more than any time. On a
shared CPU trust CPU-seconds; on a GPU wall-seconds, between two waits for it.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Turn:
    """One turn of one contestant.

    Attributes:
        cpu, wall: seconds; ``cpu`` is of the whole process, all threads.
        result: what the contestant returned.
    """

    cpu: float
    wall: float
    result: Any


def take_turn(contestant: Callable[[], Any], device: str = "cpu") -> Turn:
    if device == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    result = contestant()
    if device == "cuda":
        torch.cuda.synchronize()
    return Turn(time.process_time() - cpu, time.perf_counter() - wall, result)


def interleave(
    contestants: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu", warmup: int = 1
) -> dict[str, list[Turn]]:
    """``rounds`` turns of each, A B C A B C; the first ``warmup`` rounds are taken and not returned."""
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    for number in range(-warmup, rounds):
        for name, contestant in contestants.items():
            turn = take_turn(contestant, device)
            if number >= 0:
                turns[name].append(turn)
    return turns


@dataclass(frozen=True)
class Spread:
    """Ratios of rounds; what is gated is ``quartile``, the lower one."""

    median: float
    low: float
    high: float
    quartile: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} - {self.high:.2f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """``ours / theirs`` round by round, of rates: above 1 ours is faster."""
    assert len(ours) == len(theirs) > 0
    return [a / b for a, b in zip(ours, theirs)]


def spread(values: Sequence[float]) -> Spread:
    """
    The quartile lies between two rounds where it has to: of 1 2 3 4 5 it is 2.
    """
    place = (len(values) - 1) / 4
    ordered, below = sorted(values), int(place)
    above = ordered[min(below + 1, len(values) - 1)]
    quartile = ordered[below] + (above - ordered[below]) * (place - below)
    return Spread(statistics.median(values), ordered[0], ordered[-1], quartile)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine(device: str = "cpu") -> str:
    """Where and when figures were taken, for RESULTS.md."""
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [
            line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")
        ]
        where = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
        where += f" of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}"
    return f"{where}, torch {torch.__version__}, {datetime.date.today()}"


def plot(path: str | Path, title: str, label: str, values: dict[str, Sequence[float]]) -> None:
    """One row per name: a dot per round, a line at the median, a dashed line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(values)), layout="constrained")
    for place, numbers in enumerate(values.values()):
        axes.plot(numbers, [place] * len(numbers), "o", alpha=0.5)
        median = statistics.median(numbers)
        axes.plot([median, median], [place - 0.3, place + 0.3], "k-")
        axes.annotate(f"{median:.2f}", (median, place - 0.32), ha="center", va="bottom")
    axes.axvline(1, color="grey", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel=label, yticks=range(len(values)), yticklabels=list(values))
    axes.set_xlim(left=0)
    axes.set_ylim(len(values) - 0.4, -0.8)  # the first on top, with room for its number
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
