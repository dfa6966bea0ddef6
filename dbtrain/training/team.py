"""The workers that train a block together, as one of them sees it.

Mostly there is one, and then nothing here does anything; several share the work in `dbtrain.training.replicas`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.models import Batch, Draw, TrainableModule
from dbtrain.run_directory import BlockDirectory
from dbtrain.training.checkpoint import CheckpointStore
from dbtrain.training.room import Room
from dbtrain.training.seat import Seat


class Team:
    """A team of one: it shares with nobody and waits for nobody."""

    leads = True
    """Whether this worker claims the block and writes its checkpoints and metrics."""

    def prepare(self, module: TrainableModule, device: torch.device) -> None:
        """Bring the module to the device, for `loss`. Before optimiser and averages are made: parameters may change."""
        self._module = module.to(device)

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The mean loss of this worker's samples; its gradients become those of the mean over all workers."""
        return self._module.training_loss(batch, draw)

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the loss and the backward pass of one part of a step's batch."""
        return nullcontext()

    def share(self, draw: Draw) -> Draw:
        """This worker's rows of what was drawn for the whole batch."""
        return draw

    def mean(self, value: float) -> float:
        """The mean of a number over the workers, each of whom has to ask."""
        return value

    def all_agree(self, here: bool) -> bool:
        """Whether something holds for every worker, each of whom has to ask."""
        return here

    def stop_agreed(self, asked: bool) -> bool:
        """Whether all workers leave before the step that is next; each has to say before each step if it was asked."""
        return asked

    def leave(self) -> None:
        """Return when every worker has come here, after its training; the team is no more."""

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be spread over the workers, each of whom has to ask."""
        return tensor

    def own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This worker's part of whole tensors, by name of a parameter or by `parameter/field`."""
        return tensors

    def checkpoints(
        self, directory: BlockDirectory, attempt: int, keep: int, regular: Callable[[int], bool], room: Room
    ) -> CheckpointStore:
        """The block's checkpoints, as `CheckpointStore` has them; every worker has to call what the others call."""
        return CheckpointStore(directory, attempt, keep, regular, room)


def make_team(config: RunConfig, seat: Seat, block: int, attempt: int) -> Team:
    """The team of a worker in `seat`; it is joined in `prepare`."""
    if seat.replicas == 1:
        return Team()
    # Loading torch.distributed.fsdp takes seconds, which a worker who is alone has no use for.
    from dbtrain.training.replicas import Replicas

    return Replicas(config.resources, seat, block, attempt)


def has_lost_others(error: Exception, seat: Seat) -> bool:
    """Whether a worker's error says that the others of its team are gone, and nothing of its own."""
    if seat.replicas == 1:
        return False
    from dbtrain.training.replicas import is_of_communication

    return is_of_communication(error)


def rows_of(tensors: Batch, rows: slice) -> Batch:
    """Some of the samples of a batch or draw."""
    return {name: value[rows] for name, value in tensors.items()}
