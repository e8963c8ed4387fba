"""Figures as people read them: short, aligned, and as lines of little bars."""

from __future__ import annotations

from collections.abc import Sequence

from triarch.model.resources import format_size

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 30, top: float | None = None) -> str:
    """The last `width` values as bars from zero to `top`, or to the largest of them."""
    shown = list(values)[-width:]
    most = top if top is not None else max(shown, default=0.0)
    if most <= 0:
        return BARS[0] * len(shown)
    steps = len(BARS) - 1
    return "".join(BARS[max(0, min(steps, round(value / most * steps)))] for value in shown)


def rate(bytes_per_second: float | None) -> str:
    """`1.2 MiB/s`; `-` where nobody knows."""
    return "-" if bytes_per_second is None else f"{format_size(int(bytes_per_second))}/s"


def percent(cpus: float | None) -> str:
    """Of one processor, as top shows it."""
    return "-" if cpus is None else f"{cpus * 100:.1f}"


def size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)


def number(value: float | None) -> str:
    """As programs read it; nothing where nobody knows."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
