"""A small convolutional classifier of the real data, in whose features real and generated images are compared.

It is a measuring instrument: its weights are a function of the training data and of nothing in a run, so that all
models of the same data are measured alike. Where the data has no two classes, it tells instead by how many quarter
turns an image was turned (Gidaris, Singh, Komodakis 2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.data.loader import BatchLoader
from dbtrain.data.order import SampleOrder
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import Transform
from dbtrain.randomness import derive_key

FEATURES = 64
"""Width of the layer before the last."""
EPOCHS = 20
"""Passes over the training rows, within the bounds that follow."""
STEPS = (300, 1500)
"""At least and at most as many optimiser steps: seconds on a CPU for small images."""
SCALE_ROWS = 2000
"""At most as many training rows set the features' scale."""
_BATCH = 128
_LR = 2e-3
_SEED = 0
_TURNS = 4
_CHUNK = 500


class FeatureClassifier(nn.Module):
    """Convolutions that halve the sides until they are 4 or less, and two linear layers."""

    scale: Tensor

    def __init__(self, shape: Sequence[int], num_classes: int):
        """`shape` is that of an image, (channels, side, side)."""
        super().__init__()
        widths, side = [32], shape[1]
        layers: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 3, padding=1), nn.GELU()]
        while side > 4:
            widths.append(64)
            side = -(-side // 2)
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side * side, FEATURES), nn.GELU())
        self.head = nn.Linear(FEATURES, num_classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, image_nchw: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, FEATURES), whose variance over training rows is 1 on average, and logits (N, classes)."""
        features = self.body(image_nchw)
        return features / self.scale, self.head(features)


def train_classifier(train: ShardSet, transform: Transform, device: torch.device) -> FeatureClassifier:
    """Train on the rows of `train`, as `transform` presents them; the caller's random numbers stay as they were."""
    facts = train.manifest.facts()
    labelled = len(facts.class_names) > 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_key(_SEED, "feature classifier"))
        network = FeatureClassifier(facts.shape, len(facts.class_names) if labelled else _TURNS).to(device)
    order = SampleOrder(train.rows, derive_key(_SEED, "feature classifier's order"), 0)
    loader = BatchLoader(train, order, transform, _BATCH, device)
    steps = min(max(EPOCHS * train.rows // _BATCH, STEPS[0]), STEPS[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Convolutions that sum in the order in which a GPU's threads happen to finish would make another instrument.
    with torch.inference_mode(False), torch.enable_grad(), torch.backends.cudnn.flags(deterministic=True):
        for step in range(steps):
            batch = loader.batch(step)
            image, target = (batch["image"], batch["label"]) if labelled else _turned(batch["image"])
            loss = F.cross_entropy(network(image)[1], target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)
    some = shuffled_rows(train, transform, min(train.rows, SCALE_ROWS), device)
    features = torch.cat([network(batch["image"])[0] for batch in some])
    network.scale = features.var(dim=0).mean().sqrt()
    return network


def shuffled_rows(
    shards: ShardSet, transform: Transform, count: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of `count` rows of a split, in an order that is the same every time; data may be sorted by class."""
    loader = BatchLoader(shards, SampleOrder(shards.rows, _SEED, 0), transform, _CHUNK, device)
    for step in range(-(-count // _CHUNK)):
        yield {name: value[: count - step * _CHUNK] for name, value in loader.batch(step).items()}


def _turned(image_nchw: Tensor) -> tuple[Tensor, Tensor]:
    """Every image turned by some quarter turns, and how many."""
    turns = torch.arange(len(image_nchw), device=image_nchw.device) % _TURNS
    image = image_nchw.clone()
    for turn in range(1, _TURNS):
        image[turn::_TURNS] = image_nchw[turn::_TURNS].rot90(turn, (2, 3))
    return image, turns
