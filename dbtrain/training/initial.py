"""A block as it is before its first step, and whether a checkpoint is one of such a block."""

from __future__ import annotations

import torch
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.models import TrainableModule, family_of
from dbtrain.plan import Plan
from dbtrain.randomness import derive_key
from dbtrain.training.checkpoint import Snapshot
from dbtrain.training.planner import build_module


def initial_module(config: RunConfig, plan: Plan, index: int, codebook: Tensor | None) -> TrainableModule:
    """Block `index` on the CPU, with the weights that its training begins with: the same each time.

    `codebook` is the one of the run, None for an end-to-end network.
    """
    family, block = family_of(config), plan.blocks[index]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(config.seed, "init", plan.kind, index))
        module = build_module(family, config, block.layers, block.trained, codebook)
        family.start_from(config, block.layers, module)
    return module


def beginning(config: RunConfig, plan: Plan, index: int) -> Snapshot:
    """What a checkpoint of block `index` before its first step would hold; its `state` is empty."""
    codebook = None if plan.blocks[index].trained is None else family_of(config).codebook(config)
    module = initial_module(config, plan, index, codebook)
    weights = {name: value.detach() for name, value in module.named_parameters()}
    return Snapshot(step=0, model=weights, ema=weights, optimizer={}, state={})


def check_parameters(snapshot: Snapshot, module: TrainableModule, where: str) -> None:
    """Whether a checkpoint from `where` holds the parameters that `module` has.

    Raises:
        UserError: it does not: a family's network has changed since.
    """
    if snapshot.model.keys() != dict(module.named_parameters()).keys():
        raise UserError(
            "its checkpoints hold other parameters than such a block has in this version",
            field="run",
            value=where,
            mend="go on with the version of dbtrain it was started with, or train anew in another directory",
        )
