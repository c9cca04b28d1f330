"""The measurements as Markdown and JSON; ``plots`` draws them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.speed.processes import FRESH
from benchmarks.speed.timing import Measured


class Bound(NamedTuple):
    """What must be shown: the ratio of two settings, each "ours", "theirs", one by its full name, or a best one.

    "best", "best eager" and "best compiled" stand for the fastest setting of the side among those.
    """

    what: str  # part of the name of a row
    ours: str
    theirs: str
    ratio: float
    dtypes: tuple[str, ...] = ()  # none = all
    device: str = ""  # "cpu" or "cuda"; "" = any


CPU = {"dtypes": ("float32", "bfloat16"), "device": "cpu"}
GPU = {"dtypes": ("float16",), "device": "cuda"}
RUN, STEP, DECODE = "sd15 whole run, 1 x 512x512, 50 steps", "sd15 UNet step, guided, 1 x 512x512", "sd15 VAE decode"
BOUNDS = (
    Bound("import StableDiffusionPipeline, beyond", "ours", "theirs", 0.1, dtypes=("",)),
    Bound("load the networks of SD 1.5, warm", "ours", "theirs", 0.5),
    Bound("load the networks of SD 1.5 stored in float16, warm", "ours", "theirs", 0.5),
    Bound("peak memory of a converting load", "ours", "theirs", 0.5),
    Bound("cold start", "best", "theirs", 0.6),
    Bound("median over all schedulers", "ours", "theirs", 0.5),
    Bound(STEP, "best", "best", 0.75, **CPU),
    Bound(f"{DECODE}, 1 x 512x512", "best", "theirs", 0.55, dtypes=("float32",), device="cpu"),
    Bound(f"{DECODE}, 1 x 512x512", "best", "best", 0.9, dtypes=("float32",), device="cpu"),
    Bound(
        f"peak memory beyond the weights, {DECODE} at 512x512", "ours, optimized", "theirs", 0.7, ("float32",), "cpu"
    ),
    Bound(RUN, "best eager", "theirs", 0.7, **GPU),
    Bound(RUN, "best eager", "best eager", 0.7, **GPU),
    Bound(RUN, "best compiled", "best compiled", 1.0, **GPU),
    Bound(RUN, "best compiled", "best eager", 0.4, **GPU),
)


def table(rows: Sequence[Measured], peaks: dict[str, dict[str, float]]) -> str:
    """Return all rows: the median of every setting, and the ratio of the best of both sides with its spread.

    What our best achieves is counted in the operations of the usual way, so that with fewer it may exceed the peak.
    """
    ratios = "ours / theirs (least to largest of the rounds)"
    lines = [f"| what | dtype | ours | theirs | {ratios} | achieved, by the usual count |"]
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
        if FRESH in row.figures:
            achieved = f"new memory of that size alone: {row.median(FRESH):.2f} s"
        spread = f"{ratio:.2f} ({least:.2f} to {most:.2f})"
        lines.append(f"| {row.what} | {row.dtype} | {sides[0]} | {sides[1]} | {spread} | {achieved} |")
    return "\n".join(lines)


def peak_table(peaks: dict[str, dict[str, float]]) -> str:
    """Return what the machine multiplies, by operation and dtype, in GFLOP/s."""
    lines = [f"| GFLOP/s | {' | '.join(peaks)} |", f"|---|{'---:|' * len(peaks)}"]
    operations = dict.fromkeys(name for of_dtype in peaks.values() for name in of_dtype)
    lines += [
        f"| {name} | {' | '.join(f'{of_dtype[name]:.0f}' for of_dtype in peaks.values())} |" for name in operations
    ]
    return "\n".join(lines)


def bounds(rows: Sequence[Measured], device: str = "cpu") -> str:
    """Return what must be shown, and what was measured on a device of that type."""
    lines = ["| what | dtype | ours | theirs | bound | measured |", "|---|---|---|---|---:|---:|"]
    for row in rows:
        for bound in BOUNDS:
            if not row.what.startswith(bound.what) or bound.device not in ("", device):
                continue
            pair = [_setting(row, side, getattr(bound, side)) for side in ("ours", "theirs")]
            if None in pair or (bound.dtypes and row.dtype not in bound.dtypes):
                continue
            ratio = row.ratio(*pair)[0]
            verdict = "" if ratio <= bound.ratio else " **not met**"
            lines.append(f"| {row.what} | {row.dtype} | {pair[0]} | {pair[1]} | {bound.ratio} | {ratio:.2f}{verdict} |")
    return "\n".join(lines)


def markdown(
    rows: Sequence[Measured],
    peaks: dict[str, dict[str, float]],
    machine: dict[str, Any],
    notes: Sequence[str],
    device: str = "cpu",
) -> str:
    """Return the whole report."""
    parts = [", ".join(f"{k} {v}" for k, v in machine.items())]
    parts += [peak_table(peaks)] if peaks else []
    parts += [table(rows, peaks), bounds(rows, device)]
    parts += ["\n".join(f"* {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def to_json(
    rows: Sequence[Measured], peaks: dict[str, Any], machine: dict[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """Return everything that was measured."""
    shown = [row.to_dict() for row in rows]
    return {"machine": machine, "peak, GFLOP/s": peaks, "rows": shown, "notes": list(notes)}


def _setting(row: Measured, side: str, wanted: str) -> str | None:
    """Return the setting of a row that a bound speaks of, None if it was not measured."""
    if wanted.startswith("best"):
        return row.best(side, wanted.removeprefix("best").strip())
    return wanted if wanted in row.figures else None


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
