"""What one row of a shard holds: columns of a fixed type and shape."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

DType = Literal["uint8", "uint16", "uint32", "int64", "float16", "float32"]
Rows = dict[str, npt.NDArray[Any]]
"""Arrays by column name, each (N, *shape of the column)."""


class Record(BaseModel):
    """A part of the manifest: frozen, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Column(Record):
    """One column: every row has an array of the same type and shape."""

    name: str
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    """Empty for a single number."""

    @property
    def size(self) -> int:
        """Numbers a row."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes a row."""
        return self.size * self.numpy.itemsize

    @property
    def numpy(self) -> np.dtype[Any]:
        """The type as numpy has it."""
        return np.dtype(self.dtype)

    @property
    def arrow(self) -> pa.DataType:
        """The type as it is stored: single numbers as Arrow's own, arrays as fixed-size binary."""
        return pa.from_numpy_dtype(self.numpy) if not self.shape else pa.binary(self.bytes)

    def __str__(self) -> str:
        return " ".join([self.name, self.dtype, *(["x".join(map(str, self.shape))] if self.shape else [])])


class ImageShape(Record):
    """Shape of every image or latent, channels first."""

    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)

    @property
    def bytes(self) -> int:
        """Bytes of one image, one a channel and pixel."""
        return self.channels * self.height * self.width

    def columns(self, dtype: DType = "uint8") -> tuple[Column, ...]:
        """The columns of a data set of such images: `image` and `label`."""
        shape = (self.channels, self.height, self.width)
        return Column(name="image", dtype=dtype, shape=shape), Column(name="label", dtype="int64", shape=())

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


def token_column(length: int, vocab_size: int) -> Column:
    """Windows of `length` tokens, in the smallest type that holds every id."""
    dtype: DType = "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"
    return Column(name="tokens", dtype=dtype, shape=(length,))
