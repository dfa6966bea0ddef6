"""A plot's frame as SVG: scales, ticks, grid lines. Colours are the page's, by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 400, 230
"""Of a plot, in its own units: about the pixels of a telephone's screen, so that text stays readable there."""
_DECADES = 1.3
"""Values that span more are drawn on a logarithmic axis, where they are all positive."""


@dataclass(frozen=True)
class Scale:
    """Values onto one axis."""

    low: float
    high: float
    start: float
    """Where `low` is drawn."""
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where the value is drawn; what lies outside is drawn at the border."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, self._inside(value)))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About so many round values, rising."""
        if self.log:
            return self._decades(count)
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / count
        size = 10 ** math.floor(math.log10(raw))
        step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _decades(self, count: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = max(1, math.ceil((last - first) / count))
        factors = (1, 2, 5) if self.high / self.low <= 300 else (1,)
        found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)


def scale_of(
    values: Sequence[float], start: float, end: float, *, room: float = 0.05, log: bool | None = None
) -> Scale:
    """A scale for the finite ones of `values` with some room on both sides; logarithmic where they span decades.

    Raises:
        ValueError: none is finite.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if log is None:
        log = low > 0 and high / low > 10**_DECADES
    if log:
        extra = (high / low) ** room
        return Scale(low / extra, high * extra, start, end, True)
    span = (high - low) or abs(high) or 1.0
    return Scale(low - room * span, high + room * span, start, end)


def number(value: float) -> str:
    """As a tick's label."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Frame:
    """Two scales and the names of what they measure."""

    x: Scale
    y: Scale
    x_name: str
    y_name: str

    def draw(self, inside: Markup, about: str, x_labels: Sequence[tuple[float, str]] | None = None) -> Markup:
        """The plot with `inside` in it. `about` is for those who do not see it; `x_labels` replace ticks on x."""
        labels = [(value, number(value)) for value in self.x.ticks()] if x_labels is None else x_labels
        return Markup(
            '<svg viewBox="0 0 {w} {h}" role="img" class="plot"><title>{about}</title>{y}{x}{inside}'
            '<text x="{left}" y="11" class="name">{y_name}</text>'
            '<text x="{right}" y="{bottom}" class="name" text-anchor="end">{x_name}</text></svg>'
        ).format(
            w=WIDTH,
            h=HEIGHT,
            about=about,
            y=Markup("").join(self._y_tick(value) for value in self.y.ticks()),
            x=Markup("").join(self._x_tick(value, label) for value, label in labels),
            inside=inside,
            left=2,
            right=WIDTH - 2,
            bottom=HEIGHT - 4,
            x_name=self.x_name,
            y_name=self.y_name + (" (log)" if self.y.log else ""),
        )

    def _y_tick(self, value: float) -> Markup:
        y = self.y.at(value)
        return Markup(
            '<line x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            '<text x="{t:.1f}" y="{ty:.1f}" text-anchor="end">{label}</text>'
        ).format(a=self.x.start, b=self.x.end, y=y, t=self.x.start - 5, ty=y + 3.5, label=number(value))

    def _x_tick(self, value: float, label: str) -> Markup:
        lines = label.split("\n")
        rows = Markup("").join(
            Markup('<tspan x="{x:.1f}" dy="{dy}">{line}</tspan>').format(
                x=self.x.at(value), dy=12 if n else 0, line=line
            )
            for n, line in enumerate(lines)
        )
        return Markup('<text y="{y:.1f}" text-anchor="middle">{rows}</text>').format(y=self.y.start + 14, rows=rows)


def frame(
    xs: Sequence[float], ys: Sequence[float], x_name: str, y_name: str, *, log: bool | None = None, x_room: float = 0.0
) -> Frame:
    """Around those points. Raises ValueError if none of the values is finite."""
    x = scale_of(xs, 46, WIDTH - 18, room=x_room, log=False)
    return Frame(x, scale_of(ys, HEIGHT - 34, 20, log=log), x_name, y_name)


def path(at: Frame, xs: Sequence[float], ys: Sequence[float]) -> str:
    """A line through the points as SVG path data; it is broken where a value is not finite."""
    parts, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{at.x.at(x):.1f} {at.y.at(y):.1f}")
        pen_down = True
    return "".join(parts)
