from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import random_pixels

from dbtrain.data.loader import BatchLoader, iterate_split
from dbtrain.data.order import SampleOrder
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import EvalTransform, TrainTransform
from dbtrain.data_config import AugmentConfig, RandAugmentConfig

AUGMENT = AugmentConfig(crop_padding=1, flip=True, randaugment=RandAugmentConfig())


def loader(shards: Path, batch_size: int, augment: AugmentConfig = AUGMENT) -> BatchLoader:
    data = ShardSet.open(shards, "train")
    transform = TrainTransform(augment, data.manifest.mean, data.manifest.std, key=9)
    return BatchLoader(data, SampleOrder(data.rows, 0, block=1), transform, batch_size)


def test_a_batch_is_a_function_of_the_step(shards: Path) -> None:
    one, other = loader(shards, 16), loader(shards, 16)
    later = [one.batch(step) for step in (7, 3)]
    again = [other.batch(step) for step in (3, 7)][::-1]
    for a, b in zip(later, again, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


def test_shapes_and_types(shards: Path) -> None:
    batch = loader(shards, 16).batch(0)
    assert batch["image"].shape == (16, 3, 6, 6)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].shape == (16,)
    assert batch["label"].dtype == torch.int64


def test_distortions_do_not_depend_on_the_batch_size(shards: Path) -> None:
    small, large = loader(shards, 10), loader(shards, 40)
    joined = torch.cat([small.batch(step)["image"] for step in range(8)])
    assert torch.equal(joined, torch.cat([large.batch(step)["image"] for step in range(2)]))


def test_images_keep_their_labels(shards: Path) -> None:
    """Without distortions each image has to be one of the source's, with that one's label."""
    data = ShardSet.open(shards, "train")
    plain = BatchLoader(data, SampleOrder(40, 0, 0), TrainTransform(AugmentConfig(), (0,) * 3, (1,) * 3, 0), 40)
    batch = plain.batch(5)
    source = torch.from_numpy(random_pixels(40)).permute(0, 3, 1, 2).float() / 255
    distance = (batch["image"][:, None] - source[None]).abs().flatten(2).amax(-1)
    rows = distance.argmin(1)
    assert distance.min(1).values.max() < 1e-5
    assert torch.equal(batch["label"], rows % 4)
    assert torch.equal(rows.sort().values, torch.arange(40))


def test_evaluation_sees_every_row_in_order(shards: Path) -> None:
    data = ShardSet.open(shards, "test")
    transform = EvalTransform(data.manifest.mean, data.manifest.std)
    batches = list(iterate_split(data, transform, batch_size=4))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
    whole = transform({"image": torch.from_numpy(data.gather("image", np.arange(10)))})
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), whole["image"])
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [row % 4 for row in range(10)]


def test_replicas_partition_a_batch(shards: Path) -> None:
    data = ShardSet.open(shards, "train")
    transform = TrainTransform(AUGMENT, data.manifest.mean, data.manifest.std, key=9)
    whole = loader(shards, 16).batch(2)
    for replica in range(2):
        part = BatchLoader(data, SampleOrder(40, 0, 1, replica, 2), transform, 16).batch(2)
        assert torch.equal(part["image"], whole["image"][replica::2])
        assert torch.equal(part["label"], whole["label"][replica::2])


def test_an_order_of_other_data_is_refused(shards: Path) -> None:
    data = ShardSet.open(shards, "train")
    with pytest.raises(ValueError, match="39 rows for 40"):
        BatchLoader(data, SampleOrder(39, 0, 0), EvalTransform((0,) * 3, (1,) * 3), 4)
