"""The frozen target vectors of the labels, which all blocks share: every machine must get the same bytes.

Additions and products of float64 are the same everywhere, but matrix libraries reorder them and elementary
functions differ in the last bit. Hence sums here have a fixed order, and normal numbers are rounded to a grid
before anything is computed from them, so that such differences vanish.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.randomness import derive_key, keyed_uniform

_GRID = float(2**24)
_Array = npt.NDArray[np.float64]


def make_codebook(num_classes: int, width: int, scale: float, seed: int) -> Tensor:
    """Row c is the clean target of class c.

    Rows are orthogonal where `num_classes <= width`, independent random directions otherwise; each has the
    Euclidean norm `scale`, up to a few 1e-7 of it.

    Returns:
        (num_classes, width) float32 on the CPU, a function of the arguments alone.
    """
    uniform = keyed_uniform(derive_key(seed, "codebook"), np.arange(num_classes), width)
    normal = torch.special.ndtri(torch.from_numpy(uniform).clamp_min(2.0**-54)).numpy()
    rows = np.round(normal * _GRID) / _GRID
    if num_classes <= width:
        _orthogonalise(rows)
    rows /= np.sqrt(_sum(rows * rows))[:, None]
    rows = np.round(rows * _GRID) / _GRID
    return torch.from_numpy((rows * scale).astype(np.float32))


def stretch_rows(rows: Tensor, scale: float) -> Tensor:
    """The codebook that has the directions of given rows (C, width); a row of zeros stays as it is.

    Returns:
        (C, width) float32 on the CPU, each row of the Euclidean norm `scale`.
    """
    out = torch.empty(rows.shape)
    for first in range(0, len(rows), 1024):  # float64 copies of a whole vocabulary would need much memory
        part = rows[first : first + 1024].double().numpy()
        norms = np.sqrt(_sum(part * part))[:, None]
        out[first : first + 1024] = torch.from_numpy(part / np.where(norms == 0, 1.0, norms) * scale)
    return out


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and values, in hexadecimal."""
    array = tensor.detach().cpu().contiguous().numpy()
    header = f"{array.dtype.str} {list(array.shape)}\n".encode()
    return hashlib.sha256(header + array.tobytes()).hexdigest()


def _orthogonalise(rows: _Array) -> None:
    """Modified Gram-Schmidt in place (norms stay as they fall)."""
    for index in range(len(rows) - 1):
        row, rest = rows[index], rows[index + 1 :]
        rest -= (_sum(rest * row) / _sum(row * row))[:, None] * row


def _sum(values: _Array) -> _Array:
    """Sums over the last axis by folding it in halves: the same order of additions everywhere."""
    size = values.shape[-1]
    while size > 1:
        half = size // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        if size % 2:
            folded[..., 0] += values[..., -1]
        values, size = folded, half
    return values[..., 0]
