"""Mean and standard deviation of each channel, over rows that come a batch at a time."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Moments(Protocol):
    """Takes in batches and tells the moments of all."""

    def add(self, images: npt.NDArray[Any]) -> None:
        """Take in (N, C, H, W)."""
        ...

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel; 1 for a constant one, so that it can divide."""
        ...


class PixelMoments:
    """Of uint8 pixels, scaled to [0, 1]; exact, because pixels are counted by value."""

    def __init__(self, channels: int):
        self._counts = np.zeros((channels, 256), dtype=np.int64)

    def add(self, images: npt.NDArray[Any]) -> None:
        """Take in uint8 (N, C, H, W)."""
        for channel, counts in enumerate(self._counts):
            counts += np.bincount(images[:, channel].ravel(), minlength=256)

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel."""
        values = np.arange(256) / 255
        share = self._counts / self._counts.sum(axis=1, keepdims=True)
        mean = share @ values
        return _ready(mean, (share * (values[None] - mean[:, None]) ** 2).sum(axis=1))


class FloatMoments:
    """Of floating-point numbers as they are, in float64.

    Batches are merged by their means and sums of squared deviations (Chan, Golub, LeVeque 1983), which stays accurate
    where the mean is large beside the deviation.
    """

    def __init__(self, channels: int):
        self._count = 0
        self._mean: Floats = np.zeros(channels)
        self._squares: Floats = np.zeros(channels)

    def add(self, images: npt.NDArray[Any]) -> None:
        """Take in (N, C, H, W)."""
        if not len(images):
            return
        values = images.astype(np.float64).transpose(1, 0, 2, 3).reshape(len(self._mean), -1)
        count, mean = values.shape[1], values.mean(axis=1)
        squares = ((values - mean[:, None]) ** 2).sum(axis=1)
        total, apart = self._count + count, mean - self._mean
        self._mean = self._mean + apart * (count / total)
        self._squares = self._squares + squares + apart**2 * (self._count * count / total)
        self._count = total

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel."""
        return _ready(self._mean, self._squares / self._count)


def _ready(mean: Floats, variance: Floats) -> tuple[tuple[float, ...], tuple[float, ...]]:
    std = np.sqrt(variance)
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
