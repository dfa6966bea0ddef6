"""What every source of images offers, and how to find the one that a name, path or URI stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dbtrain.data.manifest import ImageShape, Split
from dbtrain.errors import UserError
from dbtrain.randomness import derive_key, keyed_uniform

Images = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images (N, C, H, W) and labels (N,)."""


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source."""

    size: int | None = None
    """Resize the shorter side to this many pixels and cut the centre square; not when None."""
    channels: int | None = None
    """1 for grey, 3 for colour; that of the first image when None."""
    label_column: str | None = None
    """Column of a Parquet source that holds the class ids; found by type when None."""


class ImageSource(Protocol):
    """Images of one shape with labels, in two splits."""

    @property
    def name(self) -> str:
        """What the manifest calls the source."""
        ...

    @property
    def image(self) -> ImageShape:
        """Shape of every image."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ..."""
        ...

    def rows(self, split: Split) -> int:
        """Number of images in a split."""
        ...

    def batches(self, split: Split) -> Iterator[Images]:
        """All images of a split, in a fixed order, a few hundred at a time."""
        ...


def open_source(source: str, options: SourceOptions) -> ImageSource:
    """`digits`, a Parquet file or folder (also as a pyarrow filesystem URI), or a folder of class folders.

    Raises:
        UserError: there is no such source, or nothing in it can be read.
    """
    # Each source is imported when it is used: they bring libraries that the others do not need.
    if source == "digits":
        from dbtrain.data.sources.digits import Digits

        return Digits()
    if "://" in source:
        from dbtrain.data.sources.parquet import ParquetImages

        return ParquetImages(source, options)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            "there is no such file or folder",
            field="SOURCE",
            value=source,
            mend="give `digits`, a Parquet file or folder, or a folder of class folders",
        )
    if path.is_file() or next(path.rglob("*.parquet"), None) is not None:
        from dbtrain.data.sources.parquet import ParquetImages

        return ParquetImages(source, options)
    from dbtrain.data.sources.folders import ClassFolders

    return ClassFolders(path.resolve(), options)


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
