"""Batches of one split, on the device that trains: gather, transform."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.data.order import SampleOrder
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import Transform


class BatchLoader:
    """The training batch of any step, without state: asking twice gives the same bytes."""

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        transform: Transform,
        batch_size: int,
        device: torch.device | str = "cpu",
    ):
        if order.rows != shards.rows:
            raise ValueError(f"an order of {order.rows} rows for {shards.rows} rows")
        self._shards = shards
        self._order = order
        self._transform = transform
        self._batch_size = batch_size
        self._device = torch.device(device)

    def rows(self, step: int) -> tuple[int, ...]:
        """Numbers of the step's rows in the split."""
        return tuple(self._order.rows_at(step, self._batch_size)[1].tolist())

    def batch(self, step: int) -> dict[str, Tensor]:
        """What the transform makes of the step's rows: {"image": float32 (N, C, H, W), "label": int64 (N,)}, or
        {"tokens": int64 (N, L)}; N is batch_size, or the replica's share."""
        positions, rows = self._order.rows_at(step, self._batch_size)
        return _batch(self._shards, self._transform, self._device, positions, rows)


def iterate_split(
    shards: ShardSet, transform: Transform, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Every row once, in row order, for evaluation; the last batch may be smaller."""
    for first in range(0, shards.rows, batch_size):
        rows = np.arange(first, min(first + batch_size, shards.rows), dtype=np.int64)
        yield _batch(shards, transform, torch.device(device), rows, rows)


def _batch(
    shards: ShardSet,
    transform: Transform,
    device: torch.device,
    positions: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
) -> dict[str, Tensor]:
    batch = {}
    for column in shards.manifest.columns:
        values = torch.from_numpy(shards.gather(column.name, rows))
        if device.type == "cuda":
            # Pinned memory lets the copy run beside the computation of the step before.
            values = values.pin_memory()
        batch[column.name] = values.to(device, non_blocking=True)
    return transform(batch, positions)
