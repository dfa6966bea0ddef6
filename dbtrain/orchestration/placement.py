"""How many workers fit: what one worker asks for against what each node has. No Ray in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dbtrain.errors import UserError
from dbtrain.resources_config import ResourcesConfig

Node = Mapping[str, float]
"""A node's total resources by Ray's names: CPU, GPU, ..."""

_EPSILON = 1e-6  # ten workers of 0.1 CPU fit on one


def worker_slots(nodes: Sequence[Node], resources: ResourcesConfig, blocks: int) -> int:
    """How many workers train at once: those that fit, at most `resources.workers` and one a block.

    A worker lives on one node, so what counts is the sum over nodes of the whole workers that fit on each.

    Raises:
        UserError: not even one fits; Ray alone would wait for ever.
    """
    if resources.resolved_device == "cuda" and resources.gpus == 0:
        # Ray hides all GPUs from a worker that reserves none.
        raise UserError(
            "a Ray worker sees no GPU while resources.gpus is 0",
            field="resources.device",
            value="cuda",
            mend="set resources.gpus=1, or a fraction to share a GPU",
        )
    demand = {"CPU": resources.cpus, "GPU": resources.gpus}
    fits = sum(_fit(node, demand, blocks) for node in nodes)
    if fits == 0:
        raise _does_not_fit(nodes, resources)
    return min(fits, blocks, blocks if resources.workers is None else resources.workers)


def _fit(node: Node, demand: Mapping[str, float], enough: int) -> int:
    counts = [math.floor(node.get(name, 0.0) / need + _EPSILON) for name, need in demand.items() if need > 0]
    return min([enough, *counts])


def _does_not_fit(nodes: Sequence[Node], resources: ResourcesConfig) -> UserError:
    for name, field, need in (
        ("GPU", "resources.gpus", resources.gpus),
        ("CPU", "resources.cpus", resources.cpus),
    ):
        largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if need > largest + _EPSILON:
            total = sum(node.get(name, 0.0) for node in nodes)
            has = f"the cluster has {total:g}"
            if 0 < largest < total:
                has += f", at most {largest:g} on one node"
            plural = "" if need == 1 else "s"
            mend = f"set {field}={largest:g} or less, or add nodes"
            if name == "GPU" and largest == 0:
                mend = "set resources.gpus=0, or add nodes with GPUs"
            return UserError(
                f"asks for {need:g} {name}{plural} a worker, and {has}", field=field, value=need, mend=mend
            )
    return UserError(
        f"asks for {resources.cpus:g} CPUs and {resources.gpus:g} GPUs a worker, and no node has both",
        field="resources.cpus",
        value=resources.cpus,
        mend="lower resources.cpus, or add nodes",
    )
