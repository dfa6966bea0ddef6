"""The Ray backend: one actor a live block, on a private cluster of this machine or on an existing one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dbtrain.orchestration.backend import Clock
from dbtrain.orchestration.events import WorkerDied, WorkerEvent, WorkerStarted
from dbtrain.orchestration.placement import worker_slots
from dbtrain.orchestration.ray_cluster import connect, ray
from dbtrain.orchestration.ray_worker import BlockWorker, Place
from dbtrain.orchestration.session import event_of
from dbtrain.resources_config import ResourcesConfig

# Wrapped here, so that workers import the class by its name instead of getting its code by value. Ray restarts
# nothing: that is the coordinator's business.
_as_actor: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"io": 1})  # type: ignore[call-overload]
_Actor = _as_actor(BlockWorker)


@dataclass
class _Worker:
    block: int
    attempt: int
    actor: Any
    run: Any
    """The reference of the long call; it comes out when the worker leaves."""
    place: Any
    """The reference of the first answer; None once it is in."""
    progress: Any = None
    """The reference of the question that is out: a worker that hangs is asked once, not waited for."""


class RayBackend:
    """Starts actors and listens to them."""

    name = "ray"

    def __init__(
        self,
        resources: ResourcesConfig,
        blocks: int,
        threads: int,
        address: str | None = None,
        clock: Clock = time.monotonic,
    ):
        """Connects, and checks that a worker fits.

        Raises:
            UserError: no cluster at the address, or no node that has what one worker asks for.
        """
        self._resources = resources
        self._threads = threads
        self._clock = clock
        self._run_uri: str | None = None
        self._workers: dict[int, _Worker] = {}
        self._cluster = connect(address)
        try:
            self.slots = worker_slots(self._cluster.nodes(), resources, blocks)
        except BaseException:
            self._cluster.close()
            raise

    def facts(self) -> Mapping[str, object]:
        """Where to find the workers' logs, and whether the cluster is ours."""
        return {
            "cluster": "private" if self._cluster.owned else "joined",
            "worker_logs": self._cluster.log_folder,
        }

    def attach(self, run_uri: str) -> None:
        """Name the run directory."""
        self._run_uri = run_uri

    def start(self, block: int, attempt: int) -> None:
        """Ask Ray for an actor."""
        assert self._run_uri is not None, "attach comes first"
        actor = _Actor.options(
            num_cpus=self._resources.cpus,
            num_gpus=self._resources.gpus,
        ).remote(self._run_uri, block, attempt, self._threads)
        self._workers[block] = _Worker(block, attempt, actor, actor.run.remote(), actor.place.remote())

    def stop(self, block: int, attempt: int) -> None:
        """Ask the worker to save and leave; `run` then returns."""
        worker = self._workers.get(block)
        if worker is not None and worker.attempt == attempt:
            worker.actor.stop.remote()

    def kill(self, block: int, attempt: int) -> None:
        """End the worker's process."""
        worker = self._workers.get(block)
        if worker is not None and worker.attempt == attempt:
            self._end(worker)

    def poll(self, timeout: float) -> list[WorkerEvent]:
        """Ends, first answers and progress of all workers, without waiting for any single one."""
        workers = list(self._workers.values())
        if not workers:
            time.sleep(timeout)
            return []
        for worker in workers:
            if worker.progress is None and worker.place is None:
                worker.progress = worker.actor.progress.remote()
        # Answers to `progress` come within milliseconds: waiting for them would be a busy loop.
        news = [worker.run for worker in workers] + [w.place for w in workers if w.place is not None]
        ray.wait(news, num_returns=1, timeout=timeout)
        return [event for worker in workers for event in self._hear(worker)]

    def close(self) -> None:
        """End all workers, and the cluster if it is ours."""
        for worker in list(self._workers.values()):
            self._end(worker)
        self._cluster.close()

    def _hear(self, worker: _Worker) -> list[WorkerEvent]:
        """What is ready of one worker, in the order in which it happened."""
        events: list[WorkerEvent] = []
        block, attempt = worker.block, worker.attempt
        try:
            if worker.place is not None and _ready(worker.place):
                events.append(self._started(worker, ray.get(worker.place)))
                worker.place = None
            if worker.progress is not None and _ready(worker.progress):
                report = ray.get(worker.progress)
                worker.progress = None
                if report is not None:
                    events.append(event_of(report, self._clock(), block, attempt))
            if _ready(worker.run):
                events.append(event_of(ray.get(worker.run), self._clock(), block, attempt))
                self._end(worker)
        except ray.exceptions.RayError as error:
            # The session in the worker turns whatever its code raises into an answer, so this is Ray's own
            # trouble: a dead process or node. If the actor is only out of reach, killing it makes sure that
            # it stays gone.
            events.append(WorkerDied(self._clock(), block, attempt, _cause(error)))
            self._end(worker)
        return events

    def _started(self, worker: _Worker, place: Place) -> WorkerStarted:
        device: str = self._resources.resolved_device
        if place.gpus:
            device += f":{','.join(place.gpus)}"
        return WorkerStarted(self._clock(), worker.block, worker.attempt, place.pid, place.node, device)

    def _end(self, worker: _Worker) -> None:
        ray.kill(worker.actor, no_restart=True)
        del self._workers[worker.block]


def _ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _cause(error: Exception) -> str:
    """The part of Ray's message that differs from case to case, on one line."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    return f"the worker's process died: {detail.partition(' Some common causes include')[0]}"
