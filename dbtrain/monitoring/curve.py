"""A value by step, as a block tells it: a restart goes back and repeats steps."""

from __future__ import annotations

import math
from bisect import bisect_left


class Curve:
    """Steps in rising order and a value for each."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []

    def add(self, step: int, value: float) -> None:
        """The value at `step`; what was told of this and later steps before is forgotten: it happens anew."""
        keep = bisect_left(self.steps, step)
        del self.steps[keep:], self.values[keep:]
        self.steps.append(step)
        self.values.append(value)

    def thinned(self, count: int) -> tuple[list[int], list[float]]:
        """At most `count` points: means over runs of neighbours, each at the last of their steps.

        Values that are not finite count only where a run has no others.
        """
        total = len(self.steps)
        if total <= count:
            return list(self.steps), list(self.values)
        ends = [(index + 1) * total // count for index in range(count)]
        steps, values = [], []
        for start, end in zip([0, *ends], ends, strict=False):
            finite = [value for value in self.values[start:end] if math.isfinite(value)]
            steps.append(self.steps[end - 1])
            values.append(sum(finite) / len(finite) if finite else math.nan)
        return steps, values
