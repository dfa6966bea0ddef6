"""What every source offers, and the options that say how to read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dbtrain.data.columns import Column, Rows
from dbtrain.data.manifest import Split
from dbtrain.errors import UserError
from dbtrain.model_config import DataKind
from dbtrain.randomness import derive_key, keyed_uniform

TEST_NAMES = ("test", "validation", "valid", "val")
"""What the split for testing may be called in a source, the first choice first."""
HELD_OUT = 0.1
"""Part of a source without such a split that is held out for testing."""


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source; None where the user has said nothing."""

    size: int | None = None
    """Images: resize the shorter side to this many pixels and cut the centre square; not when None."""
    channels: int | None = None
    """Images: 1 for grey, 3 for colour; that of the first image when None."""
    label_column: str | None = None
    """Images and latents in tables: column of the class ids; found by type when None."""
    text_column: str | None = None
    """Text in JSON lines or Parquet: column of the documents; `text` when None."""
    length: int | None = None
    """Text: tokens in a window."""
    tokenizer: str | None = None
    """Text: `byte` (when None), `bpe` to train one, or a tokenizer file of the Hugging Face library."""
    vocab_size: int | None = None
    """Text: number of token ids of a tokenizer that is trained."""
    subset: str | None = None
    """Data sets of the Hugging Face hub: which of several configurations."""

    def __post_init__(self) -> None:
        """Refuse values that no source could use."""
        if self.channels not in (None, 1, 3):
            raise UserError("has to be 1 or 3", field="--channels", value=self.channels)
        for name, least in (("size", 1), ("length", 2), ("vocab_size", 2)):
            value: int | None = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"has to be at least {least}", field=_flag(name), value=value)

    def check_only(self, names: tuple[str, ...], what: str) -> None:
        """Refuse options that the source cannot follow.

        Raises:
            UserError: an option besides `names` is given.
        """
        for name, value in vars(self).items():
            if value is not None and name not in names:
                known = ", ".join(_flag(known) for known in names)
                mend = f"leave it out; what applies: {known}" if names else "leave it out"
                raise UserError(f"does not apply to {what}", field=_flag(name), value=value, mend=mend)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Source(Protocol):
    """Rows of one kind, in two splits."""

    @property
    def name(self) -> str:
        """What the manifest calls the source."""
        ...

    @property
    def kind(self) -> DataKind:
        """What a row is."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of every row."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; none where there are no labels."""
        ...

    def rows(self, split: Split) -> int | None:
        """Number of rows in a split; None where only reading all of it would tell."""
        ...

    def batches(self, split: Split) -> Iterator[Rows]:
        """All rows of a split, in a fixed order, a few hundred at a time."""
        ...


def holdout(labels: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.bool_]:
    """Which rows of a source that has no test split become its test split, (N,) bool.

    The same part of every class (to the nearest row; at least one where the class has two), chosen by a fixed
    key, so that the same rows give the same split everywhere.
    """
    chance = keyed_uniform(derive_key(0, "holdout"), np.arange(len(labels)), lanes=1)[:, 0]
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(round(fraction * len(members)), 1 if len(members) > 1 else 0)
        chosen[members[np.argsort(chance[members], kind="stable")[:count]]] = True
    return chosen


def one_line(error: BaseException) -> str:
    """What a library says of an error, on one line."""
    return " ".join(str(error).split())


def image_rows(images: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> Rows:
    """Images or latents (N, C, H, W) and labels (N,) as a batch of rows."""
    return {"image": images, "label": labels}
