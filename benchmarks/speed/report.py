"""The measurements as a Markdown table and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import Measured

BOUNDS = {  # part of the name -> what it must show: (ours, theirs, largest ratio), "best" being the fastest setting
    "import StableDiffusionPipeline": [("ours", "theirs", 0.1)],
    "load the networks of SD 1.5, warm": [("ours", "theirs", 0.5)],
    "peak memory of a converting load": [("ours", "theirs", 0.5)],
    "cold start": [("best", "theirs", 0.6)],
    "median over all schedulers": [("ours", "theirs", 0.5)],
    "sd15 UNet step, guided, 1 x 512x512": [("best", "best", 0.75)],
    "sd15 VAE decode, 1 x 512x512": [("best", "theirs", 0.55), ("best", "best", 0.9)],
    "peak memory beyond the weights, sd15 VAE decode": [("ours, optimized", "theirs", 0.7)],
}


def table(rows: Sequence[Measured], peaks: dict[str, dict[str, float]]) -> str:
    """Return all rows: the median of every setting, and the ratio of the best of both sides with its spread."""
    lines = ["| what | dtype | ours | theirs | ours / theirs (least to largest of the rounds) | achieved |"]
    lines.append("|---|---|---|---|---:|---|")
    for row in rows:
        sides = [", ".join(_settings(row, side)) for side in ("ours", "theirs")]
        ratio, least, most = row.ratio(row.best("ours"), row.best("theirs"))
        achieved = ""
        if row.flop:
            speed = row.flop / row.median(row.best("ours")) / 1e9
            achieved = f"{speed:.0f} GFLOP/s"
            if row.dtype in peaks:
                achieved += f", {speed / max(peaks[row.dtype].values()):.0%} of the peak"
        spread = f"{ratio:.2f} ({least:.2f} to {most:.2f})"
        lines.append(f"| {row.what} | {row.dtype} | {sides[0]} | {sides[1]} | {spread} | {achieved} |")
    return "\n".join(lines)


def bounds(rows: Sequence[Measured]) -> str:
    """Return what must be shown, and what was measured."""
    lines = ["| what | dtype | ours | theirs | bound | measured |", "|---|---|---|---|---:|---:|"]
    for row in rows:
        for name, wanted in BOUNDS.items():
            if name not in row.what or (row.part == "vae" and row.dtype != "float32"):
                continue
            for ours, theirs, bound in wanted:
                pair = [row.best(side) if s == "best" else s for side, s in (("ours", ours), ("theirs", theirs))]
                ratio = row.ratio(*pair)[0]
                verdict = "" if ratio <= bound else " **not met**"
                lines.append(f"| {row.what} | {row.dtype} | {pair[0]} | {pair[1]} | {bound} | {ratio:.2f}{verdict} |")
    return "\n".join(lines)


def plot(rows: Sequence[Measured], path: Path) -> None:
    """Draw the ratio of the best settings of every row, theirs being 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.part != "scheduler" or row.what.startswith("median")]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.33 * len(shown)), layout="constrained")
    for y, row in enumerate(shown):
        ratio, least, most = row.ratio(row.best("ours"), row.best("theirs"))
        axes.barh(y, ratio, color="#2a7f62")
        axes.plot([least, most], [y, y], color="#333333", linewidth=1)
        axes.text(max(ratio, most) + 0.01, y, f"{ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="#aa3333", linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{row.what} {row.dtype}".strip() for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ours / theirs, the best setting of each side; left of the line is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _settings(row: Measured, side: str) -> list[str]:
    texts = []
    for name in row.figures:
        if name.startswith(side):
            setting = name.removeprefix(side).removeprefix(", ")
            texts.append(f"{_amount(row.median(name), row.unit)}{' ' + setting if setting else ''}")
    return texts


def _amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.0f} {unit}"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def to_json(rows: Sequence[Measured], peaks: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured."""
    return {"machine": machine, "peak, GFLOP/s": peaks, "rows": [row.to_dict() for row in rows]}
