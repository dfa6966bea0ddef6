"""How many workers fit: what one worker asks for against what each node has. No Ray in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dbtrain.errors import UserError
from dbtrain.orchestration.events import Node
from dbtrain.resources_config import ResourcesConfig

_EPSILON = 1e-6  # ten workers of 0.1 CPU fit on one


@dataclass(frozen=True)
class Machine:
    """A node of the cluster and all it has, in use or not."""

    id: str
    resources: Mapping[str, float]
    """By Ray's names: CPU, GPU, accelerator_type:H100, and whatever the node was started with."""


def room(machines: Sequence[Machine], resources: ResourcesConfig, enough: int) -> tuple[Node, ...]:
    """How many workers fit on each node, at most `enough`; a worker lives on one node."""
    demand = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
    return tuple(
        Node(machine.id, _fit(machine.resources, demand, enough) if _has_type(machine, resources) else 0)
        for machine in machines
    )


def check_room(machines: Sequence[Machine], resources: ResourcesConfig, nodes: Sequence[Node]) -> None:
    """Whether at least one block fits, with all its replicas; Ray alone would wait for ever.

    Raises:
        UserError: it does not; the message has the numbers.
    """
    if resources.resolved_device == "cuda" and resources.gpus == 0:
        # Ray hides all GPUs from a worker that reserves none.
        raise UserError(
            "a Ray worker sees no GPU while resources.gpus is 0",
            field="resources.device",
            value="cuda",
            mend="set resources.gpus=1, or a fraction to share a GPU",
        )
    fits = sum(node.slots for node in nodes)
    if fits == 0:
        raise _does_not_fit(machines, resources)
    if fits < resources.replicas:
        raise UserError(
            f"asks for {resources.replicas} workers a block, and {fits} fit{'s' if fits == 1 else ''} on the cluster's "
            f"{len(machines)} node{'' if len(machines) == 1 else 's'} ({_totals(machines, resources)})",
            field="resources.replicas",
            value=resources.replicas,
            mend=f"set resources.replicas={fits} or less, let each take less, or add nodes",
        )
    if resources.workers is not None and resources.workers < resources.replicas:
        raise UserError(
            f"allows fewer workers than the {resources.replicas} that one block is to have",
            field="resources.workers",
            value=resources.workers,
            mend=f"set resources.workers={resources.replicas} or more, or lower resources.replicas",
        )


def _fit(has: Mapping[str, float], demand: Mapping[str, float], enough: int) -> int:
    counts = [_times(name, has.get(name, 0.0), need) for name, need in demand.items() if need > 0]
    return min([enough, *counts])


def _times(name: str, has: float, need: float) -> int:
    """How often `need` can be taken; a part of a GPU has to be of one."""
    if name == "GPU" and need < 1:
        return math.floor(has + _EPSILON) * math.floor(1 / need + _EPSILON)
    return math.floor(has / need + _EPSILON)


def _has_type(machine: Machine, resources: ResourcesConfig) -> bool:
    return resources.accelerator is None or machine.resources.get(f"accelerator_type:{resources.accelerator}", 0) > 0


def _totals(machines: Sequence[Machine], resources: ResourcesConfig) -> str:
    names = [name for name, need in (("CPU", resources.cpus), ("GPU", resources.gpus)) if need > 0]
    names += resources.custom
    sums = {name: sum(machine.resources.get(name, 0.0) for machine in machines) for name in names}
    return ", ".join(f"{total:g} {name}" for name, total in sums.items())


def _does_not_fit(machines: Sequence[Machine], resources: ResourcesConfig) -> UserError:
    if resources.accelerator is not None and not any(_has_type(machine, resources) for machine in machines):
        prefix = "accelerator_type:"
        types = sorted({n.removeprefix(prefix) for m in machines for n in m.resources if n.startswith(prefix)})
        return UserError(
            f"no node has it; the cluster has {', '.join(types) or 'no accelerators'}",
            field="resources.accelerator",
            value=resources.accelerator,
            mend="name one of those, or leave it out" if types else "leave it out, or add nodes that have it",
        )
    for name, field, need in (
        ("GPU", "resources.gpus", resources.gpus),
        ("CPU", "resources.cpus", resources.cpus),
        *((name, f"resources.custom.{name}", need) for name, need in resources.custom.items()),
    ):
        largest = max((machine.resources.get(name, 0.0) for machine in machines), default=0.0)
        if need > largest + _EPSILON:
            total = sum(machine.resources.get(name, 0.0) for machine in machines)
            has = f"the cluster has {total:g}"
            if 0 < largest < total:
                has += f", at most {largest:g} on one node"
            plural = "" if need == 1 or name not in ("CPU", "GPU") else "s"
            mend = f"set {field}={largest:g} or less, or add nodes"
            if largest == 0:
                mend = f"set {field}=0, or add nodes with GPUs" if name == "GPU" else "add nodes that have it"
            return UserError(
                f"asks for {need:g} {name}{plural} a worker, and {has}", field=field, value=need, mend=mend
            )
    wanted = [f"{resources.cpus:g} CPUs", f"{resources.gpus:g} GPUs"]
    wanted += [f"{need:g} {name}" for name, need in resources.custom.items()]
    return UserError(
        f"asks for {' and '.join(wanted)} a worker, and no node has all of it",
        field="resources.cpus",
        value=resources.cpus,
        mend="lower resources.cpus, or add nodes",
    )
