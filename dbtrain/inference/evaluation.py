"""What an evaluation says, whatever the family: a metric with its direction, by read-out, by step, by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dbtrain.plan import Kind


@dataclass(frozen=True)
class Metric:
    """What is measured."""

    name: str
    unit: Literal["fraction", "bits", "distance"]
    better: Literal["higher", "lower"]

    def show(self, value: float) -> str:
        """For people: fractions in percent."""
        return f"{100 * value:.2f}" if self.unit == "fraction" else f"{value:.4f}"

    @property
    def title(self) -> str:
        """Name with the unit of `show`."""
        return self.titled(self.name.replace("_", " "))

    def titled(self, name: str) -> str:
        """Another name of a figure of this metric, with that unit."""
        return name + (", %" if self.unit == "fraction" else "")


ACCURACY = Metric("accuracy", "fraction", "higher")
FRECHET_DISTANCE = Metric("frechet_distance", "distance", "lower")
BITS_PER_BYTE = Metric("bits_per_byte", "bits", "lower")
BITS_PER_CHARACTER = Metric("bits_per_character", "bits", "lower")

SO_FAR = "so_far"
"""What a step of the chain also says: the metric of `product` over the steps up to and with it, from the first starting
noise alone. It is the answer of a committee; where steps know of each other's answers, `last` is the chain's."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""
Point = dict[str, float]
"""What one step or one block says: `block`, its noise level (`sigma`, or `level` for masks), the metric by its name,
and what else there is to say, such as `cross_entropy` in nats."""


def titles(metric: Metric) -> dict[str, str]:
    """What people read for the keys of points that do not speak for themselves."""
    so_far = metric.titled("product so far")
    return {"cross_entropy": "cross-entropy, nats", metric.name: metric.title, SO_FAR: so_far}


@dataclass(frozen=True)
class Evaluation:
    """The metric on one split, and where it comes from."""

    kind: Kind
    split: str
    rows: int
    """Rows of the split that were used."""
    metric: Metric
    readouts: dict[str, float]
    """The metric by read-out; a single entry, named like the metric, where there is no choice."""
    predict: str
    """The read-out that the model uses when it is asked for an answer."""
    chain: tuple[Point, ...] = ()
    """One entry a step of the chain: the mean over starting noises; and `SO_FAR`, where steps answer."""
    alone: tuple[Point, ...] = ()
    """One entry a block without the blocks before it."""
    also: dict[str, float] = field(default_factory=dict)
    """Other figures, by name."""
    calibration: dict[str, float] = field(default_factory=dict)
    """Expected calibration error of a classifier, a fraction, by the names of `readouts`."""
    without: tuple[Point, ...] = ()
    """One entry a block of several: `block`, and the metric of the chain walked without it, by read-out."""

    @property
    def value(self) -> float:
        """The metric of the read-out in use."""
        return self.readouts[self.predict]

    @property
    def pooled(self) -> bool:
        """Whether every step of the chain also says what all of them do so far."""
        return bool(self.chain) and all(SO_FAR in point for point in self.chain)

    @property
    def best(self) -> str:
        """The read-out that does best on this very split."""
        choose = max if self.metric.better == "higher" else min
        return choose(self.readouts, key=lambda name: self.readouts[name])

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Evaluation:
        """What `as_json` gave, after a round trip through JSON. Raises TypeError or KeyError if it is not that."""
        lists = {name: tuple(plain.get(name, ())) for name in ("chain", "alone", "without")}
        return cls(**{**plain, **lists, "metric": Metric(**plain["metric"])})

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
