"""Results as PNGs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLOURS = {"gained": "tab:green", "lost": "tab:red", "within noise": "tab:grey"}  # of verdicts
MOST = 40  # characters of a label


@contextlib.contextmanager
def panels(path: str | Path, height: float, count: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure of ``height`` inches and its axes, one below the other; saved at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(count, figsize=(8, height), layout="constrained", squeeze=False)
    yield figure, axes[:, 0]
    figure.savefig(path, dpi=120)
    plt.close(figure)


def drawable(text: str) -> str:
    """Matplotlib's own font has no Chinese, and what stands between two "$" would be a formula."""
    text = text if len(text) <= MOST else f"...{text[3 - MOST :]}"
    return text.encode("ascii", "backslashreplace").decode().replace("$", r"\$")


def bars(path: str | Path, names: list[str], series: dict[str, dict[str, dict[str, Any]]]) -> None:
    """A bar per task and series with its interval; a diamond where the vendor published a figure.

    Args:
        names: of the benchmarks, the first on top.
        series: label -> benchmark -> entry of results.json that has a value.
    """
    width = 0.8 / len(series)
    published: dict[float, float] = {}  # place -> figure
    with panels(path, 1.5 + 0.2 * (len(names) * (len(series) + 0.6) + len(series))) as (figure, (axes,)):
        for number, (label, tasks) in enumerate(series.items()):
            shown = {names.index(name) + (number + 0.5) * width - 0.4: task for name, task in tasks.items()}
            published |= {p: task["published"] for p, task in shown.items() if task["published"] is not None}
            values = [task["value"] for task in shown.values()]
            ends = [(task["value"] - task["low"], task["high"] - task["value"]) for task in shown.values()]
            errors = [[max(0.0, end[side]) for end in ends] for side in (0, 1)]  # rounding may make it -1e-14
            style = dict(ecolor="0.25", elinewidth=1, capsize=2)
            axes.barh(list(shown), values, width, xerr=errors, error_kw=style, label=drawable(label))
        if published:
            axes.plot(list(published.values()), list(published), "kD", markersize=4, label="published")
        metrics = {name: task["metric"] for tasks in series.values() for name, task in tasks.items()}
        labels = [name if metrics[name] == "accuracy" else f"{name} ({metrics[name]})" for name in names]
        axes.set(yticks=range(len(names)), yticklabels=labels, xlabel="percent; BLEU", xlim=(0, 100))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside upper center", frameon=False)


def gains(path: str | Path, verdicts: list[dict[str, Any]]) -> None:
    """Gains to the right, losses to the left, a bar per task, coloured by its verdict."""
    from matplotlib.patches import Patch

    told = [verdict for verdict in verdicts if verdict["verdict"]]
    with panels(path, 1.4 + 0.32 * len(told)) as (figure, (axes,)):
        for place, verdict in enumerate(told):
            size, p = verdict["difference"], verdict["p"]
            axes.barh(place, size, color=COLOURS[verdict["verdict"]])
            side = dict(ha="left", xytext=(4, 0)) if size >= 0 else dict(ha="right", xytext=(-4, 0))
            text = f"{size:+.1f} (p {p:.2g})"
            axes.annotate(text, (size, place), textcoords="offset points", va="center", fontsize=8, **side)
        labels = [f"{verdict['benchmark']} ({verdict['style']})" for verdict in told]
        axes.set(yticks=range(len(told)), yticklabels=labels, xlabel="after minus before (points)")
        axes.set_ylim(len(told) - 0.4, -0.6)
        most = max(abs(verdict["difference"]) for verdict in told) or 1
        axes.set_xlim(-1.5 * most, 1.5 * most)  # with room for the numbers
        axes.axvline(0, color="black", linewidth=0.8)
        handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)


def curve(
    path: str | Path, domains: dict[str, dict[str, list[tuple[float, dict[str, Any]]]]], ticks: Any
) -> None:
    """A panel per domain, a line with its interval per task.

    Args:
        domains: domain -> task -> (place on the x axis, entry of results.json that has a value).
        ticks: how a number of tokens is written, or the labels of the places 0, 1, ...
    """
    with panels(path, 0.4 + 3 * len(domains), len(domains)) as (_, grid):
        for axes, (domain, tasks) in zip(grid, domains.items()):
            names = list(dict.fromkeys(points[0][1]["benchmark"] for points in tasks.values()))
            for label, points in tasks.items():
                first, places = points[0][1], [place for place, _ in points]
                look = dict(color=f"C{names.index(first['benchmark'])}", label=label)
                look |= (
                    dict(marker="s", linestyle="--", fillstyle="none")
                    if first["style"] == "harness"
                    else dict(marker="o")
                )
                axes.plot(places, [task["value"] for _, task in points], **look)
                ends = [[task[end] for _, task in points] for end in ("low", "high")]
                axes.fill_between(places, *ends, color=look["color"], alpha=0.12, linewidth=0)
            axes.set(title=domain, ylabel="BLEU" if domain == "translation" else "percent")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
            if callable(ticks):
                axes.xaxis.set_major_formatter(lambda value, _: ticks(value))
                axes.set_xlim(left=0)
                axes.set_xlabel("trained tokens")
            else:
                axes.set_xticks(range(len(ticks)), map(drawable, ticks), rotation=30, ha="right")
