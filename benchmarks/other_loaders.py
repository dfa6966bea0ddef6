"""The same images and distortions by way of torch's DataLoader, as most programs have it: a sample at a time."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

PADDING = 4
WARM_UP = 10
"""Batches that are not timed: the worker processes start, and fill their queues."""

Sample = dict[str, Any]


class Distort:
    """Pad and crop, flip, normalise one image, what torchvision's RandomCrop, RandomHorizontalFlip and Normalize do."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image_chw: Tensor) -> Tensor:
        """uint8 (C, H, W) -> float32 of the same shape."""
        height, width = image_chw.shape[1:]
        padded = F.pad(image_chw, (PADDING,) * 4)
        top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
        image = padded[:, top : top + height, left : left + width]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image.float() / 255).sub_(self._mean).div_(self._std)


class Samples(Dataset[Sample]):
    """Rows of arrays in memory."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], distort: Distort):
        self._images, self._labels, self._distort = images, labels, distort

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """One sample."""
        image = self._distort(torch.from_numpy(self._images[index]))
        return {"image": image, "label": int(self._labels[index])}


class Collate:
    """Samples of a Hugging Face dataset in torch's format -> a batch."""

    def __init__(self, distort: Distort):
        self._distort = distort

    def __call__(self, samples: list[Sample]) -> Sample:
        """Distort each, and stack them."""
        batch: Sample = default_collate([{**one, "image": self._distort(one["image"])} for one in samples])
        return batch


def torch_loader(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], distort: Distort, batch_size: int, workers: int
) -> DataLoader[Sample]:
    """A shuffled DataLoader over the arrays."""
    samples = Samples(images, labels, distort)
    return DataLoader(samples, batch_size, shuffle=True, num_workers=workers, drop_last=True)


def hugging_face_loader(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], distort: Distort, batch_size: int, workers: int
) -> DataLoader[Sample] | None:
    """A shuffled DataLoader over a Hugging Face dataset of the arrays; None where `datasets` is not installed."""
    if importlib.util.find_spec("datasets") is None:
        return None
    import datasets

    shape = images.shape[1:]
    features = datasets.Features({"image": datasets.Array3D(shape, "uint8"), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    stored: Any = table.with_format("torch")
    return DataLoader(
        stored, batch_size, shuffle=True, num_workers=workers, drop_last=True, collate_fn=Collate(distort)
    )


def rows_per_second(loader: DataLoader[Sample], batches: int) -> float:
    """Of the batches after the first few; the worker processes end with the call."""
    rows, start, stream = 0, 0.0, iter(loader)
    for number in range(WARM_UP + batches):
        if number == WARM_UP:
            start = time.perf_counter()
        batch = next(stream)
        rows += len(batch["label"]) if number >= WARM_UP else 0
    return rows / (time.perf_counter() - start)
