"""Documents -> rows of exactly L tokens: one endless stream, cut wherever a row is full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dbtrain.data.text.tokenizer import Ids

_BATCH_TOKENS = 1 << 18


class Packer:
    """Puts documents one after the other, a separator behind each, and cuts the stream into rows.

    What is left at the end and fills no row is dropped and counted.
    """

    def __init__(self, length: int, separator: int, dtype: npt.DTypeLike):
        self._length = length
        self._separator = np.array([separator], dtype=dtype)
        self._dtype = np.dtype(dtype)
        self._pending: list[npt.NDArray[Any]] = []
        self._waiting = 0
        self.documents = 0
        """Documents packed so far; empty ones do not count."""
        self.tokens = 0
        """Their tokens, separators included."""

    @property
    def dropped(self) -> int:
        """Tokens at the end of the stream so far that fill no row."""
        return self.tokens % self._length

    def rows(self, documents: Iterable[Iterable[Ids]]) -> Iterator[npt.NDArray[Any]]:
        """Rows (N, L) of documents that come as parts; memory is bounded by the largest part."""
        for document in documents:
            empty = True
            for part in document:
                if part.size:
                    empty = False
                    self._add(part.astype(self._dtype))
                    if self._waiting >= max(_BATCH_TOKENS, self._length):
                        yield self._cut()
            if not empty:
                self._add(self._separator)
                self.documents += 1
        if self._waiting >= self._length:
            yield self._cut()

    def _add(self, part: npt.NDArray[Any]) -> None:
        self._pending.append(part)
        self._waiting += part.size
        self.tokens += part.size

    def _cut(self) -> npt.NDArray[Any]:
        stream = np.concatenate(self._pending)
        full = stream.size // self._length * self._length
        self._pending, self._waiting = [stream[full:].copy()], stream.size - full
        return stream[:full].reshape(-1, self._length)
