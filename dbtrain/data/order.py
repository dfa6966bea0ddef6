"""The order of samples: a keyed permutation of row numbers, evaluated in O(1) at any position.

A Feistel network on ceil(log2 n) bits is a bijection of [0, 2^bits); walking its cycles until the value falls
below n restricts it to one of [0, n) (format-preserving encryption; Black, Rogaway 2002). Nothing is stored
and nothing advances: a data cursor is the step number alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dbtrain.randomness import derive_key, mix64

Int64s = npt.NDArray[np.int64]

# Even, so that the unequal halves of an odd number of bits end on their own sides.
_ROUNDS = 6
# Positions whose rows are made at once and remembered: for a small batch alone, calls of numpy would take longer than
# its numbers.
_STRETCH = 4096


class KeyedPermutation:
    """A pseudo-random bijection of [0, n), the same for the same key on every machine."""

    def __init__(self, n: int, key: int):
        if n < 1:
            raise ValueError(f"cannot permute {n} rows")
        self.n = n
        bits = (n - 1).bit_length()
        self._low_bits = (bits + 1) // 2
        self._high_bits = bits - self._low_bits
        self._keys = mix64(np.uint64(key) ^ np.arange(_ROUNDS, dtype=np.uint64))

    def __call__(self, index: Int64s) -> Int64s:
        """The images of `index`, (N,) int64 in [0, n); any subset, in any order."""
        value = self._feistel(index.astype(np.uint64))
        outside = np.flatnonzero(value >= np.uint64(self.n))
        while outside.size:
            walked = self._feistel(value[outside])
            value[outside] = walked
            outside = outside[walked >= np.uint64(self.n)]
        return value.astype(np.int64)

    def _feistel(self, value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        high_bits, low_bits = self._high_bits, self._low_bits
        high = value >> np.uint64(low_bits)
        low = value & _mask(low_bits)
        for key in self._keys:
            high, low = low, high ^ (mix64(low ^ key) & _mask(high_bits))
            high_bits, low_bits = low_bits, high_bits
        return (high << np.uint64(low_bits)) | low


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


@lru_cache(maxsize=16)
def _stretch(rows: int, seed: int, block: int, epoch: int, number: int) -> Int64s:
    """Rows at the places from `number` * _STRETCH on, of one epoch."""
    first = number * _STRETCH
    permutation = KeyedPermutation(rows, derive_key(seed, "order", block, epoch))
    return permutation(np.arange(first, min(first + _STRETCH, rows), dtype=np.int64))


class SampleOrder:
    """Which rows a block sees at which step, without state.

    Position p counts the samples of the endless sequence of epochs; it stands for row
    permutation[epoch p // rows](p mod rows). Every row occurs exactly once an epoch, and batches may straddle
    epochs. Replicas of a block take interleaved parts of the same global batch.
    """

    def __init__(self, rows: int, seed: int, block: int, replica: int = 0, replicas: int = 1):
        if rows < 1:
            raise ValueError(f"an order needs rows, not {rows}")
        if not 0 <= replica < replicas:
            raise ValueError(f"replica {replica} is not one of {replicas}")
        self.rows = rows
        self.seed = seed
        self.block = block
        self.replica = replica
        self.replicas = replicas

    def rows_at(self, step: int, batch_size: int) -> tuple[Int64s, Int64s]:
        """Positions and rows, each (N,) int64, that this replica takes at `step` (from 0).

        `batch_size` is the global one; N is its share: every `replicas`-th sample from number `replica` on.
        """
        first = step * batch_size
        positions = np.arange(first + self.replica, first + batch_size, self.replicas, dtype=np.int64)
        epoch, offset = divmod(first, self.rows)
        number, start = divmod(offset, _STRETCH)
        if start + batch_size <= _STRETCH and offset + batch_size <= self.rows:
            # As nearly all batches are: within one stretch.
            stretch = _stretch(self.rows, self.seed, self.block, epoch, number)
            return positions, stretch[start + self.replica : start + batch_size : self.replicas].copy()
        epochs, offsets = np.divmod(positions, self.rows)
        rows = np.empty_like(positions)
        stretches = epochs * self.rows + offsets // _STRETCH
        for identity in np.unique(stretches).tolist():
            epoch, number = divmod(identity, self.rows)
            inside = stretches == identity
            here = _stretch(self.rows, self.seed, self.block, epoch, number)
            rows[inside] = here[offsets[inside] - number * _STRETCH]
        return positions, rows
