"""One replica of a block in a process of its own, as a worker of a cluster would be."""

from __future__ import annotations

import os
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from dbtrain.data.loader import BatchLoader
from dbtrain.orchestration.session import BlockSession, Outcome
from dbtrain.run_directory import RunDirectory
from dbtrain.training.seat import Seat
from dbtrain.training.trainer import BlockTrainer


def main(run: str, attempt: int, seat: Seat, stop_at: int, poisoned: tuple[int, ...], told: Connection) -> None:
    """Train block 0 of a run; send each report's step, and at the end the outcome's fields. Trouble makes it stop."""
    last = seat.replica == seat.replicas - 1
    if last:
        _poison(poisoned)
    session = BlockSession(run, 0, attempt, seat)
    while not isinstance(report := session.advance(), Outcome):
        told.send({"step": report.step})
        if (last and report.step == stop_at) or report.trouble is not None:
            session.request_stop()
    told.send(asdict(report))
    # As a worker is ended: at once. A process group that lost a member would hold up an ordinary exit.
    os._exit(0)


def measure(run: str, seat: Seat, told: Connection) -> None:
    """Train block 0 and send the bytes of what this replica holds, by the names of a plan's `Bytes`."""
    trainer = BlockTrainer(RunDirectory.open(run), 0, 1, seat)
    parameters = list(trainer.module.parameters())
    staying: list[list[Tensor]] = []
    loss = trainer._team.loss

    def noting(batch: Any, draw: Any) -> Tensor:
        staying.append([p.grad for p in parameters if p.grad is not None])
        return loss(batch, draw)

    trainer._team.loss = noting  # type: ignore[method-assign]
    for _ in trainer.train():
        pass
    held: dict[str, list[Tensor]] = {
        "parameters": [p.detach() for p in parameters],
        "buffers": list(trainer.module.buffers()),
        "gradients": staying[-1],  # before the last backward pass: the buckets of DDP, and no others beside them
        "optimiser": [value for fields in trainer.optimizer.state.values() for value in fields.values()],
        "ema": [] if trainer.ema is None else list(trainer.ema.tensors().values()),
    }
    told.send({name: sum(map(_bytes, tensors)) for name, tensors in held.items()})
    os._exit(0)


def _bytes(tensor: Tensor) -> int:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()


def _poison(steps: tuple[int, ...]) -> None:
    """Put a NaN into this process's images of some steps."""
    read = BatchLoader.batch

    def batch(self: BatchLoader, step: int) -> dict[str, Any]:
        found: dict[str, Tensor] = read(self, step)
        if step in steps:
            found["image"][0] = float("nan")
        return found

    BatchLoader.batch = batch  # type: ignore[method-assign]
