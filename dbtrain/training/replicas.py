"""Several workers of one block: rows of every batch dealt out, gradients averaged, everything else agreed upon.

All replicas hold the same weights (DDP), or a part of them each (FSDP2). Whatever decides how training goes on is the
same number on all of them: the gradients and their norm are those of the whole batch, checkpoints are loaded by
replica 0 and handed round, and a request to stop counts once all have heard of it. So no replica ever waits in a
collective that another will not enter, unless that one is gone; then the wait ends with an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore  # public as torch.distributed.PrefixStore, but not to mypy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dbtrain.errors import NoRoom
from dbtrain.models import Batch, Draw, TrainableModule
from dbtrain.models.layers import layers_of
from dbtrain.resources_config import ResourcesConfig
from dbtrain.run_directory import BlockDirectory
from dbtrain.training.checkpoint import CheckpointStore, Snapshot
from dbtrain.training.meeting import choose_interface, join
from dbtrain.training.room import Room
from dbtrain.training.seat import Seat
from dbtrain.training.team import Team


class Replicas(Team):
    """The replicas of a block, as the one in `seat` sees them: a process group of their own for each attempt."""

    def __init__(self, resources: ResourcesConfig, seat: Seat, block: int, attempt: int):
        """`seat.replicas` is above 1; nobody is met before `prepare`."""
        self.leads = seat.replica == 0
        self._seat = seat
        self._sharded = resources.shard
        self._name = f"block{block}/attempt{attempt}"
        # Dead peers close their connections, and hung ones are found by the coordinator; until either happens,
        # waiting is right: replica 0 may be busy with a slow disk for as long as a step may take.
        self._timeout = resources.step_timeout
        self._asked = torch.zeros(1)
        self._vote: Any = None  # dist.Work, once the first is out

    def prepare(self, module: TrainableModule, device: torch.device) -> None:
        """Meet the others, and wrap the module; with `resources.shard` its parameters become DTensors.

        Raises:
            RuntimeError: the others did not come in time, or left; see `is_of_communication`.
        """
        assert self._seat.meeting is not None, "replicas are told where they meet"
        choose_interface(self._seat.meeting)
        timeout = timedelta(seconds=self._timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(self._name, join(self._seat.meeting, self._timeout)),
            rank=self._seat.replica,
            world_size=self._seat.replicas,
            timeout=timeout,
        )
        # Numbers on the CPU go their own way: nobody waits for the GPU, and a dead peer is noticed at once there.
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._module, self._device = module, device
        step = _TrainingLoss(module)
        if self._sharded:
            self._step: nn.Module = _shard(step, device, self._seat.replicas)
            return
        # With unused parameters looked for, DDP never rearranges its buckets: where a gradient lies in its bucket
        # decides in which order more than two summands are added, and that must be the same after a restart. One
        # parameter is unused for sure, or DDP would warn on each worker's standard error that there was none.
        module.to(device)
        step.register_parameter("unused", nn.Parameter(torch.zeros(1, device=device)))
        with warnings.catch_warnings():
            # The newer name of `broadcast_buffers` is not known to PyTorch 2.11.
            warnings.simplefilter("ignore", FutureWarning)
            self._step = averaging = DistributedDataParallel(
                step, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
            )
        # Left alone, DDP divides by 3 in another way in the first step after a start than in those that follow.
        averaging.register_comm_hook(None, allreduce_hook)

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The mean loss of this replica's samples."""
        loss: Tensor = self._step(batch, draw)
        return loss

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP sums up the parts and averages once. FSDP2 averages each: keeping sums would take whole gradients."""
        if last or not isinstance(self._step, DistributedDataParallel):
            return nullcontext()
        return self._step.no_sync()

    def share(self, draw: Draw) -> Draw:
        """Every `replicas`-th row, as `SampleOrder` deals out samples: a sample's noise is its own, whoever has it."""
        rows = slice(self._seat.replica, None, self._seat.replicas)
        return {name: value[rows].contiguous() for name, value in draw.items()}

    def mean(self, value: float) -> float:
        """The mean over the replicas; summed in the same order each time."""
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return float(total) / self._seat.replicas

    def all_agree(self, here: bool) -> bool:
        """Whether it holds for every replica."""
        return self.mean(float(here)) == 1.0

    def first(self, value: float) -> float:
        """What replica 0 gives, on all of them."""
        told = torch.tensor(value, dtype=torch.float64)
        self._broadcast(told)
        return float(told)

    def stop_agreed(self, asked: bool) -> bool:
        """Whether one of the replicas was asked before the step that is just over.

        The answer to what is said now is collected at the next call: it travels while the step is computed.
        """
        if self._vote is not None:
            self._vote.wait()
            if bool(self._asked):
                return True
        self._asked.fill_(float(asked))
        self._vote = dist.all_reduce(self._asked, group=self._control, async_op=True)
        return False

    def meet(self) -> None:
        """Return when every replica has come here; the device is not waited for."""
        self.mean(0.0)

    def leave(self) -> None:
        """Meet, and end the process group.

        Where training ends otherwise, the group ends with the process: ending it here would wait for all that is still
        on its way to replicas that are gone, while others may wait for this one.
        """
        self.meet()
        dist.destroy_process_group()

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor, on the device of its parts."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Parts like those of the parameters; step counters stay whole."""
        parameters = dict(self._module.named_parameters())
        return {key: self._part_like(value, parameters[key.partition("/")[0]]) for key, value in tensors.items()}

    def checkpoints(
        self, directory: BlockDirectory, attempt: int, keep: int, regular: Callable[[int], bool], room: Room
    ) -> CheckpointStore:
        """Those of replica 0, shared."""
        return _SharedCheckpoints(self, directory, attempt, keep, regular, room)

    def hand_round(self, snapshot: Snapshot | None) -> Snapshot | None:
        """What replica 0 gives, on all of them."""
        header = _header(snapshot) if self.leads else b""
        size = torch.tensor(len(header))
        self._broadcast(size)
        text = torch.frombuffer(bytearray(header), dtype=torch.uint8) if self.leads else _empty_bytes(int(size))
        self._broadcast(text)
        told = json.loads(bytes(text.tolist()))
        if told is None:
            return None
        received: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for part, name, shape, dtype in told["tensors"]:
            if snapshot is not None:
                tensor = getattr(snapshot, part)[name].contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self._broadcast(tensor)
            received[part][name] = tensor
        return Snapshot(
            step=told["step"],
            model=received["model"],
            ema=received["ema"] if told["ema"] else None,
            optimizer=received["optimizer"],
            state=told["state"],
        )

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._control)

    def _part_like(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        # Every replica has the whole and cuts out its own part; nothing is sent.
        return distribute_tensor(
            value.to(self._device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )


class _TrainingLoss(nn.Module):
    """Makes `training_loss` the forward pass, which is what DDP and FSDP2 hook into."""

    def __init__(self, module: TrainableModule):
        super().__init__()
        self.module = module

    def forward(self, batch: Batch, draw: Draw) -> Tensor:
        return self.module.training_loss(batch, draw)


class _SharedCheckpoints(CheckpointStore):
    """Replica 0 alone reads and writes; each call is one that all replicas make."""

    def __init__(
        self,
        replicas: Replicas,
        block: BlockDirectory,
        attempt: int,
        keep: int,
        regular: Callable[[int], bool],
        room: Room,
    ):
        self._replicas = replicas
        # No fence lets attempt -1 through: the others could not write even by mistake.
        super().__init__(block, attempt if replicas.leads else -1, keep, regular, room)

    def save(self, snapshot: Snapshot) -> None:
        """Replica 0 may have to wait for the checkpoint before; the others wait with it, and give up with it."""
        no_room: NoRoom | None = None
        if self._replicas.leads:
            try:
                super().save(snapshot)
            except NoRoom as error:
                no_room = error
        durable = int(self._replicas.first(self.durable_step))
        if not self._replicas.leads:  # replica 0's own may have grown meanwhile
            self.durable_step = durable
        if self._replicas.first(float(no_room is not None)):
            raise no_room or NoRoom("replica 0 finds no room for a checkpoint")

    def load_latest(self) -> Snapshot | None:
        """One replica decides which checkpoint is the newest intact one."""
        return self._shared(super().load_latest() if self._replicas.leads else None)

    def go_back(self, well_until: int) -> Snapshot | None:
        """As `load_latest`."""
        return self._shared(super().go_back(well_until) if self._replicas.leads else None)

    def _shared(self, found: Snapshot | None) -> Snapshot | None:
        snapshot = self._replicas.hand_round(found)
        self.durable_step = 0 if snapshot is None else snapshot.step
        return snapshot


def is_of_communication(error: Exception) -> bool:
    """Whether `error` comes from a collective that others did not come to, or left."""
    # Gloo raises plain RuntimeErrors, with the place in its sources.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _shard(step: _TrainingLoss, device: torch.device, replicas: int) -> nn.Module:
    """FSDP2: each layer is gathered when its turn comes, all that is in no list of layers for the whole step.

    Layers go to the device one by one, so that it never holds the whole block.
    """
    mesh = init_device_mesh(device.type, (replicas,))
    for layer in layers_of(step):
        fully_shard(layer, mesh=mesh)
        for name in getattr(layer, "called_in_training", ()):
            register_fsdp_forward_method(layer, name)
    fully_shard(step, mesh=mesh)
    return step


def _header(snapshot: Snapshot | None) -> bytes:
    """What a snapshot has beside the values of its tensors, as JSON; null for none."""
    if snapshot is None:
        return b"null"
    parts = {"model": snapshot.model, "ema": snapshot.ema or {}, "optimizer": snapshot.optimizer}
    tensors = [
        (part, name, list(value.shape), str(value.dtype).removeprefix("torch."))
        for part, values in parts.items()
        for name, value in values.items()
    ]
    told = {"step": snapshot.step, "ema": snapshot.ema is not None, "state": snapshot.state, "tensors": tensors}
    return json.dumps(told).encode()


def _empty_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
