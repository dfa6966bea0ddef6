"""A curve, and a share, in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DECADES = 2.0
"""Values that span so many powers of ten are drawn by their logarithms."""
NOT_FINITE = "!"


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What to draw with."""

    levels: str
    """Of a curve, lowest first."""
    done: str
    left: str
    marker: str
    """Points at a row."""
    cut: str
    """Stands for what has no room."""


UNICODE = Glyphs(levels="▁▂▃▄▅▆▇█", done="█", left="░", marker="▸", cut="…")
ASCII = Glyphs(levels="_.,-=+*#", done="#", left=".", marker=">", cut="~")
"""For terminals of another encoding."""


def sparkline(values: Sequence[float], glyphs: Glyphs = UNICODE) -> str:
    """One character a value: the lowest and the highest of them are the first and the last level.

    The scale is logarithmic where positive values span `DECADES`. Values that are not finite show as `NOT_FINITE`, and
    values that are all the same as the lowest level.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return NOT_FINITE * len(values)
    low, high = min(finite), max(finite)
    # By logarithms: a quotient could overflow.
    logarithmic = low > 0 and math.log10(high) - math.log10(low) >= DECADES
    scale = math.log10 if logarithmic else float
    bottom, span = scale(low), scale(high) - scale(low)
    levels = glyphs.levels

    def level(value: float) -> str:
        if not math.isfinite(value):
            return NOT_FINITE
        share = (scale(value) - bottom) / span if 0 < span < math.inf else 0.0
        return levels[min(int(share * len(levels)), len(levels) - 1)]

    return "".join(map(level, values))


def bar(fraction: float, width: int, glyphs: Glyphs = UNICODE) -> str:
    """A share of 1 as `width` characters; full only when nothing is left."""
    filled = min(max(int(fraction * width), 0), width)
    return glyphs.done * filled + glyphs.left * (width - filled)
