"""The batches that one block is trained on."""

from __future__ import annotations

import torch

from dbtrain.config import RunConfig
from dbtrain.data.batches import make_transform
from dbtrain.data.loader import BatchLoader
from dbtrain.data.node_cache import local_shards
from dbtrain.data.order import SampleOrder
from dbtrain.data.shards import ShardSet
from dbtrain.errors import UserError
from dbtrain.models import family_of
from dbtrain.plan import Plan
from dbtrain.randomness import derive_key
from dbtrain.training.seat import Seat


def open_batches(config: RunConfig, plan: Plan, index: int, seat: Seat, device: torch.device) -> BatchLoader:
    """Those of block `index`, or of its replica in `seat`, in the block's own order and with its own distortions.

    Raises:
        UserError: the shards are gone or others than the plan's.
        CorruptData: a shard is not what its manifest says.
    """
    assert plan.data is not None, "a run directory's plan knows its data"
    shards = ShardSet.open(local_shards(config.data, plan.data.sha256), "train")
    if shards.manifest.facts().sha256 != plan.data.sha256:
        raise UserError(
            "the shards here are not those the run was planned with",
            field="data.path",
            value=config.data.location,
            mend="every machine has to see the same prepared data",
        )
    scaling = family_of(config).scaling(config, plan.data)
    transform = make_transform(config, plan.data, scaling, derive_key(config.seed, "augment", index))
    order = SampleOrder(shards.rows, config.seed, index, seat.replica, seat.replicas)
    return BatchLoader(shards, order, transform, plan.batch_size, device)
