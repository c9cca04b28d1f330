"""The measurements as plots: the ratio of every row, and how cost grows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import Measured

OURS, THEIRS = "#2a7f62", "#aa3333"
MEGA = 1e6


def ratios(rows: Sequence[Measured], path: Path) -> None:
    """Draw the ratio of the best settings of every row, theirs being 1; growing rows have a plot of their own."""
    plt = _pyplot()
    shown = [row for row in rows if row.part != "growth"]
    shown = [row for row in shown if row.part != "scheduler" or row.what.startswith("median")]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.33 * len(shown)), layout="constrained")
    for y, row in enumerate(shown):
        ratio, least, most = row.ratio(row.best("ours"), row.best("theirs"))
        axes.barh(y, ratio, color=OURS)
        axes.plot([least, most], [y, y], color="#333333", linewidth=1)
        axes.text(max(ratio, most) + 0.01, y, f"{ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=THEIRS, linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{row.what} {row.dtype}".strip() for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ours / theirs, the best setting of each side; left of the line is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(rows: Sequence[Measured], path: Path) -> None:
    """Draw seconds per picture over the batch and seconds per megapixel over the pixels, a row of panels per network.

    Ours as ``optimize`` makes it, theirs in its best setting of each case; solid and dashed tell dtypes apart.
    """
    plt = _pyplot()
    shown = [row for row in rows if row.part == "growth"]
    works = list(dict.fromkeys(_work(row) for row in shown))
    dtypes = list(dict.fromkeys(row.dtype for row in shown))
    figure, grid = plt.subplots(len(works), 2, figsize=(10, 3.4 * len(works)), layout="constrained", squeeze=False)
    for axes, work in zip(grid, works, strict=True):
        for dtype, line in zip(dtypes, ("-", "--", ":"), strict=False):
            here = [row for row in shown if (_work(row), row.dtype) == (work, dtype)]
            for side, color in (("ours", OURS), ("theirs", THEIRS)):
                options = {"color": color, "linestyle": line, "marker": ".", "label": f"{side}, {dtype}"}
                axes[0].plot(*batch_curve(here, side), **options)
                axes[1].plot(*pixel_curve(here, side), **options)
        axes[0].set(title=work, xlabel="pictures at once", ylabel="seconds per picture", xscale="log")
        axes[1].set(title=work, xlabel="megapixels of one picture", ylabel="seconds per megapixel", xscale="log")
        for one in axes:
            one.set_ylim(bottom=0)
            one.legend(fontsize=8)
            one.grid(alpha=0.3)
        ticks = sorted({row.case["batch"] for row in shown})
        axes[0].set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes[0].minorticks_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def batch_curve(rows: Sequence[Measured], side: str) -> tuple[list[float], list[float]]:
    """Return the batches of the size that has several, and the seconds per picture."""
    sizes = [row.case["pixels"] for row in rows if row.case["batch"] > 1]
    one = sizes[0] if sizes else None
    points = [(row.case["batch"], _seconds(row, side) / row.case["batch"]) for row in rows if row.case["pixels"] == one]
    return _columns(points)


def pixel_curve(rows: Sequence[Measured], side: str) -> tuple[list[float], list[float]]:
    """Return the megapixels of single pictures, and the seconds per megapixel."""
    points = [
        (row.case["pixels"] / MEGA, _seconds(row, side) * MEGA / row.case["pixels"])
        for row in rows
        if row.case["batch"] == 1
    ]
    return _columns(points)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = sorted(points)
    return [x for x, _ in points], [y for _, y in points]


def _seconds(row: Measured, side: str) -> float:
    optimized = "ours, optimized"
    setting = optimized if side == "ours" and optimized in row.figures else row.best(side)
    return row.median(setting)


def _work(row: Measured) -> str:
    """Return "sd15 VAE decode" of "sd15 VAE decode, 1 x 512x512"."""
    return row.what.rpartition(", ")[0]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
