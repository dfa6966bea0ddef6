"""The Ray actor that trains one block. Light to import: the process answers before PyTorch is loaded."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    from dbtrain.orchestration.session import BlockSession, Outcome
    from dbtrain.training.progress import Progress
    from dbtrain.training.seat import Seat


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    pid: int
    node: str
    """IP address of the machine."""
    node_id: str
    gpus: tuple[str, ...]
    """Ids of the GPUs that Ray gave it."""


class BlockWorker:
    """Trains one block in `run`; the other methods answer meanwhile, from the concurrency group `io`.

    It gets a path and a few numbers: weights never go through Ray's object store.
    """

    def __init__(self, run_uri: str, block: int, attempt: int, threads: int, seat: Seat):
        # The first line of the worker's log, by which it is found.
        who = f"block {block} attempt {attempt}" + (f" replica {seat.replica}" if seat.replicas > 1 else "")
        print(f"dbtrain run {run_uri} {who} process {os.getpid()}", flush=True)
        # Native thread pools read it when PyTorch is loaded, which happens in `run`.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._arguments = (run_uri, block, attempt, seat)
        self._session: BlockSession | None = None
        self._stop = False
        self._lock = threading.Lock()

    def run(self) -> Outcome:
        """Train to the end, or until `stop`."""
        from dbtrain.orchestration.session import BlockSession, Outcome

        with self._lock:
            self._session = session = BlockSession(*self._arguments)
            if self._stop:
                session.request_stop()
        while not isinstance(report := session.advance(), Outcome):
            pass
        why = f": {report.reason}" if report.reason else ""
        print(f"dbtrain block {self._arguments[1]}: {report.kind} at step {report.step}{why}", flush=True)
        return report

    @ray.method(concurrency_group="io")
    def place(self) -> Place:
        """Answers as soon as the process is up."""
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return Place(os.getpid(), address, ray.get_runtime_context().get_node_id(), gpus)

    @ray.method(concurrency_group="io")
    def progress(self) -> Progress | None:
        """The newest report; None before the block is built."""
        return None if self._session is None else self._session.progress()

    @ray.method(concurrency_group="io")
    def stop(self) -> None:
        """Finish the step in hand, save, and leave `run`."""
        with self._lock:
            self._stop = True
            if self._session is not None:
                self._session.request_stop()
