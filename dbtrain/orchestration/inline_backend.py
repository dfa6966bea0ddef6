"""The inline backend: blocks train in this process, one after the other; for small runs and debuggers."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dbtrain.errors import UserError
from dbtrain.orchestration.backend import Clock
from dbtrain.orchestration.events import Node, StartWorker, WorkerEvent, WorkerStarted
from dbtrain.orchestration.session import BlockSession, Outcome, event_of
from dbtrain.orchestration.stopping import StopToken
from dbtrain.resources_config import ResourcesConfig
from dbtrain.training.seat import Seat


@dataclass
class _Worker:
    block: int
    attempt: int
    session: BlockSession
    announced: bool = False


class InlineBackend:
    """One slot; each `poll` trains the block in it up to its next report."""

    name = "inline"
    replicates = False

    def __init__(self, device: str, stop: StopToken, clock: Clock = time.monotonic):
        self._device = device
        self._clock = clock
        self._run_uri: str | None = None
        self._worker: _Worker | None = None
        # A step may be long: the trainer hears of a stop at once, not when `poll` returns.
        stop.listen(self._stop_session)

    def facts(self) -> Mapping[str, object]:
        """Nothing that the journal does not know."""
        return {}

    def nodes(self) -> tuple[Node, ...]:
        """This process."""
        return (Node(platform.node(), 1),)

    def attach(self, run_uri: str) -> None:
        """Name the run directory."""
        self._run_uri = run_uri

    def start(self, order: StartWorker) -> None:
        """Take the block on; training starts with the next `poll`."""
        assert self._run_uri is not None, "attach comes first"
        assert self._worker is None, "the coordinator respects the one slot"
        session = BlockSession(self._run_uri, order.block, order.attempt, Seat(until=order.until))
        self._worker = _Worker(order.block, order.attempt, session)

    def stop(self, block: int, attempt: int) -> None:
        """Ask the block's trainer to save and leave."""
        self._stop_session()

    def kill(self, block: int, attempt: int) -> None:
        """Drop the block where it stands."""
        self.close()

    def poll(self, timeout: float) -> list[WorkerEvent]:
        """Train up to the next report, or wait when there is nothing to train."""
        worker = self._worker
        if worker is None:
            time.sleep(timeout)
            return []
        if not worker.announced:
            worker.announced = True
            node = platform.node()
            return [WorkerStarted(self._clock(), worker.block, worker.attempt, os.getpid(), node, self._device)]
        with _torch_threads_restored():
            report = worker.session.advance()
        if isinstance(report, Outcome):
            self._worker = None
        return [event_of(report, self._clock(), worker.block, worker.attempt)]

    def close(self) -> None:
        """Drop the block in hand; its newest checkpoint stays."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.session.close()

    def _stop_session(self) -> None:
        if self._worker is not None:
            self._worker.session.request_stop()


def check_gpus(resources: ResourcesConfig) -> None:
    """Whether this machine has the GPUs that the run asks for.

    Raises:
        UserError: it has fewer.
    """
    if resources.resolved_device == "cpu":
        return
    have, need = torch.cuda.device_count(), max(resources.gpus, 1.0)
    if have < need:
        field = "resources.gpus" if resources.gpus > 0 else "resources.device"
        value = resources.gpus if resources.gpus > 0 else resources.device
        raise UserError(
            f"asks for {need:g} GPU{'' if need == 1 else 's'}, and PyTorch sees {have} here",
            field=field,
            value=value,
            mend=f"set resources.gpus={have}" if have else "set resources.gpus=0 and resources.device=cpu",
        )


@contextmanager
def _torch_threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
