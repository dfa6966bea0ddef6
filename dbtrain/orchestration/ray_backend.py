"""The Ray backend: one actor a live block, or several, on a private cluster of this machine or on an existing one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

from dbtrain.config import RunConfig
from dbtrain.orchestration.backend import Clock
from dbtrain.orchestration.events import Node, StartWorker, WorkerEvent
from dbtrain.orchestration.placement import check_room, room
from dbtrain.orchestration.ray_cluster import connect
from dbtrain.orchestration.ray_group import WorkerGroup
from dbtrain.orchestration.ray_worker import BlockWorker
from dbtrain.plan import Plan
from dbtrain.training.meeting import MeetingPlace
from dbtrain.training.memory import oom_advice
from dbtrain.training.seat import Seat
from dbtrain.training.stem import averages_stems

_ENOUGH = 1_000_000  # workers on one node, where nothing that they ask for limits their number

# Wrapped here, so that workers import the class by its name instead of getting its code by value. Ray restarts
# nothing: that is the coordinator's business.
_as_actor: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"io": 1})  # type: ignore[call-overload]
_Actor = _as_actor(BlockWorker)


class RayBackend:
    """Starts actors and listens to them."""

    name = "ray"
    replicates = True

    def __init__(self, config: RunConfig, plan: Plan, address: str | None = None, clock: Clock = time.monotonic):
        """Connects, and checks that a worker fits.

        Raises:
            UserError: no cluster at the address, or not the room that one block asks for.
        """
        self._config = config
        self._resources = config.resources
        self._plan = plan
        self._clock = clock
        self._run_uri: str | None = None
        self._groups: dict[int, WorkerGroup] = {}
        self._meeting: MeetingPlace | None = None
        self._cluster = connect(address)
        try:
            check_room(self._cluster.machines(), self._resources, self.nodes())
        except BaseException:
            self._cluster.close()
            raise

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are alive, and how many workers fit on each.

        Raises:
            RunInterrupted: the cluster's head is gone.
        """
        return room(self._cluster.machines(), self._resources, _ENOUGH)

    def facts(self) -> Mapping[str, object]:
        """Where to find the workers' logs, and whether the cluster is ours."""
        return {
            "cluster": "private" if self._cluster.owned else "joined",
            "worker_logs": self._cluster.log_folder,
        }

    def attach(self, run_uri: str) -> None:
        """Name the run directory."""
        self._run_uri = run_uri

    def start(self, order: StartWorker) -> None:
        """Ask Ray for the actors of a block."""
        assert self._run_uri is not None, "attach comes first"
        meeting = (
            self._meeting_address() if order.replicas > 1 or averages_stems(self._config, self._plan.kind) else None
        )
        actor = _Actor.options(**self._options(order.avoid))
        seats = [Seat(replica, order.replicas, meeting, order.until) for replica in range(order.replicas)]
        actors = [actor.remote(self._run_uri, order.block, order.attempt, self._plan.threads, seat) for seat in seats]
        self._groups[order.block] = WorkerGroup(
            order.block,
            order.attempt,
            self._resources.resolved_device,
            actors,
            self._clock,
            out_of_memory=lambda: oom_advice(self._config, self._plan, order.block),
        )
        self._tell_who_lives()

    def stop(self, block: int, attempt: int) -> None:
        """Ask the workers to save and leave; their `run` then returns."""
        if (group := self._group(block, attempt)) is not None:
            group.stop()

    def kill(self, block: int, attempt: int) -> None:
        """End the workers' processes."""
        if (group := self._group(block, attempt)) is not None:
            self._end(group)

    def poll(self, timeout: float) -> list[WorkerEvent]:
        """Ends, first answers and progress of all workers, without waiting for any single one."""
        groups = list(self._groups.values())
        if not groups:
            time.sleep(timeout)
            return []
        for group in groups:
            group.ask()
        # Answers to `ask` come within milliseconds: waiting for them would be a busy loop.
        ray.wait([ref for group in groups for ref in group.awaited()], num_returns=1, timeout=timeout)
        events: list[WorkerEvent] = []
        for group in groups:
            news, over = group.hear()
            events += news
            if over:
                self._end(group)
        return events

    def close(self) -> None:
        """End all workers, and the cluster if it is ours."""
        if self._cluster.head_answers():
            for group in list(self._groups.values()):
                self._end(group)
        self._cluster.close()

    def _options(self, avoid: frozenset[str]) -> dict[str, Any]:
        """What Ray is to give one actor, and where."""
        resources = self._resources
        options: dict[str, Any] = {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "resources": dict(resources.custom),
            "scheduling_strategy": "SPREAD" if resources.nodes == "spread" else "DEFAULT",
        }
        if resources.accelerator is not None:
            options["accelerator_type"] = resources.accelerator
        if avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        return options

    def _group(self, block: int, attempt: int) -> WorkerGroup | None:
        group = self._groups.get(block)
        return group if group is not None and group.attempt == attempt else None

    def _end(self, group: WorkerGroup) -> None:
        group.kill()
        del self._groups[group.block]
        self._tell_who_lives()

    def _meeting_address(self) -> str:
        """Where workers that have to talk meet; opened for the first of them."""
        if self._meeting is None:
            self._meeting = MeetingPlace(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        return self._meeting.address

    def _tell_who_lives(self) -> None:
        """Keep the list of workers for whom others may wait."""
        if self._meeting is not None:
            self._meeting.tell_live({block: group.attempt for block, group in self._groups.items()})
