"""Handwritten digits that come with scikit-learn (Alpaydin, Kaynak 1998): 1,797 grey 8 x 8 images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from dbtrain.data.columns import ImageShape, Rows
from dbtrain.data.manifest import Split
from dbtrain.data.sources.base import holdout, image_rows
from dbtrain.errors import UserError

_TEST_FRACTION = 0.2
_FULL_INTENSITY = 16
_SHAPE = ImageShape(channels=1, height=8, width=8)


class Digits:
    """The digits, with a fifth of every class for testing."""

    name = "digits"
    kind: Literal["image"] = "image"
    columns = _SHAPE.columns()
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "scikit-learn, which the digits come with, is not installed",
                field="SOURCE",
                value=self.name,
                mend="pip install 'dbtrain[demo]'",
            ) from None
        bunch = load_digits()
        scaled = np.rint(bunch.images * (255 / _FULL_INTENSITY)).astype(np.uint8)
        self._images = scaled.reshape(-1, 1, _SHAPE.height, _SHAPE.width)
        self._labels = bunch.target.astype(np.int64)
        test = holdout(self._labels, _TEST_FRACTION)
        self._members = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}

    def rows(self, split: Split) -> int:
        """Number of images in a split."""
        return len(self._members[split])

    def batches(self, split: Split) -> Iterator[Rows]:
        """All images of a split at once: they are few."""
        members = self._members[split]
        yield image_rows(self._images[members], self._labels[members])
