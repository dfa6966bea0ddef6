"""A cluster on paper for `simulator.py`: failures as published traces have them, nodes, workers, and two kinds of run.

Events come from a queue and workers are numbers; `dbtrain.orchestration.coordinator.step` decides what the blocks do.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import (
    CapacityChanged,
    Event,
    KillWorker,
    Node,
    StartWorker,
    StopWorker,
    Tick,
    WorkerDied,
    WorkerFinished,
    WorkerProgress,
    WorkerStarted,
)
from dbtrain.orchestration.state import BlockState, BlockStatus, Policy, initial_state

FAILURES_OF_1000_NODE_DAYS = 6.50
"""Of nodes of 8 GPUs: cluster RSC-1 in 11 months (Kokolis et al. 2024, "Revisiting Reliability in Large-Scale Machine
Learning Research Clusters", arXiv 2410.21680). Llama 3 405B saw 3.8: 419 unexpected interruptions of 2,048 nodes in 54
days (Dubey et al. 2024, "The Llama 3 Herd of Models", arXiv 2407.21783, table 5)."""


class Kind(StrEnum):
    """What a failure does."""

    NODE = "node"
    """All workers of the node die, and it is away until it is repaired."""
    WORKER = "worker"
    """One worker dies; the node is well."""
    HANG = "hang"
    """One worker answers no longer; the node is well."""


INTERRUPTIONS = {Kind.NODE: 315, Kind.WORKER: 62, Kind.HANG: 42}
"""The 419 of Llama 3 (table 5) by what each would do here. Node: GPU and its memory 262, parts of the host 21, its
maintenance 32. Worker: software bugs and dependencies 56, silent data corruption 6. Hang: network 35, watchdog 7."""

WORKERS_OF_A_NODE = 10
DAY = 86_400.0
REPORT = 55.0
"""Whoever was not heard of for so long tells its step before the clock ticks; less than the heartbeat time-out."""
GIVEN_UP = 10
"""A run that takes so many times as long as it would without failures is not followed to its end."""


@dataclass(frozen=True)
class Setting:
    """Assumptions; seconds where nothing else is said."""

    days: float = 14.0
    """Length of the run without failures, in days."""
    nodes: int = 100
    """That the run needs, each with a worker for every one of ten blocks."""
    spares: int = 0
    """More nodes of the kind."""
    step: float = 1.0
    checkpoint_steps: int = 1800
    start_up: float = 60.0
    """From the request for a worker to its first step: process, program, checkpoint."""
    notice: float = 30.0
    """Until the death of a node is known."""
    repair: float = 4 * 3600.0
    """Until a node that failed is back, as a new one."""

    @property
    def steps(self) -> int:
        """Of each block."""
        return round(self.days * DAY / self.step)

    @property
    def ideal(self) -> float:
        """Length of the run without failures, its start included."""
        return self.start_up + self.steps * self.step

    @property
    def workers(self) -> int:
        """That the run needs: as many as blocks."""
        return self.nodes * WORKERS_OF_A_NODE


@dataclass(frozen=True)
class Failure:
    """One drawn failure."""

    time: float
    kind: Kind
    node: int
    worker: int
    """Which of the node's."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    failures: int
    wall_days: float
    over_ideal: float
    """Share by which the run took longer than without failures."""
    utilisation: float
    """Share of the workers' time in which steps were made that lasted."""
    restarts: int
    """Of workers."""
    recomputed: float
    """Share of the steps that were made again."""
    finished: bool = True
    """Whether it came to its end: all blocks have, or the job has."""
    events: int = 0
    """That the coordinator took."""


def draw(setting: Setting, times: float, seed: int) -> Iterator[Failure]:
    """Failures without end, as independent nodes have them (a Poisson process)."""
    draws = random.Random(seed)
    rate = (setting.nodes + setting.spares) * times * FAILURES_OF_1000_NODE_DAYS / 1000 / DAY
    now = 0.0
    while True:
        now += draws.expovariate(rate)
        kind = draws.choices(list(INTERRUPTIONS), weights=list(INTERRUPTIONS.values()))[0]
        yield Failure(now, kind, draws.randrange(setting.nodes + setting.spares), draws.randrange(WORKERS_OF_A_NODE))


@dataclass
class Worker:
    """One worker from its request to its end."""

    block: int
    attempt: int
    node: int
    first_step: int
    asked_at: float
    ready_at: float
    answered: bool = False
    heard_at: float = 0.0
    lost_at: float | None = None
    """When it stopped working, before anybody knew."""


class Cluster:
    """Nodes and workers, and the queue of what happens next."""

    def __init__(self, setting: Setting, failures: Iterator[Failure]):
        blocks = setting.workers
        self.setting = setting
        self.now = 0.0
        self.events = self.failures = self.recomputed = 0
        self._drawn = failures
        self._queue: list[tuple[float, int, WorkerStarted | WorkerFinished | Tick | Failure | int]] = []
        """News of a worker, the clock, a failure, or the number of a node that is found dead or has been repaired."""
        self._numbers = count()
        self._nodes: list[Node | None] = [
            Node(f"node-{node}", WORKERS_OF_A_NODE) for node in range(setting.nodes + setting.spares)
        ]
        """None while a node is repaired."""
        self._dead: set[int] = set()
        """Nodes of which nobody has noticed it yet."""
        self._workers: dict[int, Worker] = {}
        self._saved = [0] * blocks
        """Newest checkpoint of each block."""
        nodes = [node for node in self._nodes if node is not None]
        self._state = initial_state([BlockStatus(block) for block in range(blocks)], nodes=nodes, policy=Policy())

    def run(self) -> Outcome:
        """Until every block has ended."""
        self._feed(Tick(0.0))
        self._draw()
        while not self._state.done and self.now < GIVEN_UP * self.setting.ideal:
            self.now, _, what = heapq.heappop(self._queue)
            match what:
                case Failure():
                    self._fail(what)
                    self._draw()
                case int():
                    self._change(what)
                case Tick():
                    self._report()
                    self._feed(what)
                case WorkerStarted() | WorkerFinished():
                    worker = self._workers.get(what.block)
                    if worker is not None and worker.attempt == what.attempt and worker.lost_at is None:
                        worker.answered = True
                        if isinstance(what, WorkerFinished):
                            del self._workers[what.block]
                        self._feed(what)
        blocks = self._state.blocks
        finished = sum(block.state is BlockState.FINISHED for block in blocks)
        return Outcome(
            failures=self.failures,
            wall_days=self.now / DAY,
            over_ideal=self.now / self.setting.ideal - 1,
            utilisation=finished * self.setting.steps * self.setting.step / (len(blocks) * self.now),
            restarts=sum(block.restarts for block in blocks),
            recomputed=self.recomputed / (len(blocks) * self.setting.steps),
            finished=finished == len(blocks),
            events=self.events,
        )

    def _push(self, when: float, what: WorkerStarted | WorkerFinished | Tick | Failure | int) -> None:
        heapq.heappush(self._queue, (when, next(self._numbers), what))

    def _draw(self) -> None:
        failure = next(self._drawn)
        self._push(failure.time, failure)

    def _feed(self, event: Event) -> None:
        """Let the coordinator decide, and do what it wants; come back when a back-off is over."""
        self.events += 1
        before = self._state
        self._state, actions = step(before, event)
        for action in actions:
            match action:
                case StartWorker():
                    self._start(action)
                case KillWorker(block):
                    del self._workers[block]
                    self._look_again(block)
                case StopWorker():
                    raise AssertionError("nobody asks for it")
        if isinstance(event, WorkerDied):
            self._look_again(event.block)

    def _look_again(self, block: int) -> None:
        if self._state.blocks[block].state is BlockState.RESTARTING:
            when = self._state.blocks[block].retry_at
            self._push(when, Tick(when))

    def _start(self, action: StartWorker) -> None:
        """Put a worker where there is most room, as far as anybody knows."""
        taken = Counter(worker.node for worker in self._workers.values())
        place = min(
            (
                number
                for number, node in enumerate(self._nodes)
                if node is not None and node.id not in action.avoid and taken[number] < node.slots
            ),
            key=lambda number: taken[number],
        )
        node = self._nodes[place]
        assert node is not None
        block, attempt, ready = action.block, action.attempt, self.now + self.setting.start_up
        done = ready + (self.setting.steps - self._saved[block]) * self.setting.step
        worker = Worker(block, attempt, place, self._saved[block], self.now, ready)
        worker.lost_at = self.now if place in self._dead else None
        self._workers[block] = worker
        self._push(ready, WorkerStarted(ready, block, attempt, 1, node.id, "cuda:0", node.id))
        self._push(done, WorkerFinished(done, block, attempt, self.setting.steps))

    def _fail(self, failure: Failure) -> None:
        """Workers stop working; when that is noticed is another matter."""
        node = self._nodes[failure.node]
        if node is None or failure.node in self._dead:
            return  # it does not work anyway
        self.failures += 1
        there = [worker for _, worker in sorted(self._workers.items()) if worker.node == failure.node]
        match failure.kind:
            case Kind.NODE:
                for worker in there:
                    self._lose(worker)
                self._dead.add(failure.node)
                self._push(self.now + self.setting.notice, failure.node)
            case Kind.WORKER:
                for worker in there[failure.worker : failure.worker + 1]:
                    self._lose(worker)
                    self._die(worker, "killed", node.id)
            case Kind.HANG:
                for worker in there[failure.worker : failure.worker + 1]:
                    self._lose(worker)
                    policy = self._state.policy
                    late = worker.heard_at + policy.heartbeat_timeout
                    when = late if worker.answered else worker.asked_at + policy.start_timeout
                    self._push(when, Tick(when))

    def _change(self, number: int) -> None:
        """A node is found dead, or is back as another one."""
        node = self._nodes[number]
        if node is None:
            self._nodes[number] = Node(f"node-{number}-since-{self.now:.0f}", WORKERS_OF_A_NODE)
            self._feed(CapacityChanged(self.now, self._standing()))
            return
        self._dead.discard(number)
        self._nodes[number] = None
        self._push(self.now + self.setting.repair, number)
        there = [worker for _, worker in sorted(self._workers.items()) if worker.node == number]
        self._feed(CapacityChanged(self.now, self._standing()))
        for worker in there:
            self._die(worker, "its node is gone", node.id)

    def _standing(self) -> tuple[Node, ...]:
        return tuple(node for node in self._nodes if node is not None)

    def _lose(self, worker: Worker) -> None:
        """The worker stops working now; what it did since its newest checkpoint is lost."""
        if worker.lost_at is None:
            at = self._tell(worker)
            self.recomputed += at - max(self._saved[worker.block], worker.first_step)
            worker.lost_at = self.now

    def _die(self, worker: Worker, reason: str, node_id: str) -> None:
        del self._workers[worker.block]
        self._feed(WorkerDied(self.now, worker.block, worker.attempt, reason, node_id))

    def _report(self) -> None:
        """Who works has been heard of in time; between two decisions it does not matter how often."""
        for worker in list(self._workers.values()):
            if worker.answered and worker.lost_at is None and self.now - worker.heard_at >= REPORT:
                self._tell(worker)

    def _tell(self, worker: Worker) -> int:
        """Tell the coordinator how far a worker is; returns the step."""
        if not worker.answered:
            return worker.first_step
        at = worker.first_step + int((self.now - worker.ready_at) / self.setting.step)
        saved = max(at - at % self.setting.checkpoint_steps, worker.first_step)
        self._saved[worker.block] = saved
        worker.heard_at = self.now
        self._feed(WorkerProgress(self.now, worker.block, worker.attempt, at, 1.0, 1 / self.setting.step, saved))
        return at


def synchronous(setting: Setting, failures: Iterator[Failure]) -> Outcome:
    """The same work as one job in which every step needs all workers: a failure takes all of them back."""
    notice = {Kind.NODE: setting.notice, Kind.WORKER: 0.0, Kind.HANG: Policy().heartbeat_timeout}
    up = set(range(setting.nodes + setting.spares))
    used = set(range(setting.nodes))
    repairs: list[tuple[float, int]] = []
    first_step, recomputed, seen, restarts = 0, 0, 0, 0
    ready: float | None = setting.start_up
    """When the steps begin or began; None while there are too few nodes."""
    failure = next(failures)
    while failure.time < GIVEN_UP * setting.ideal:
        if repairs and repairs[0][0] <= failure.time:
            now, node = heapq.heappop(repairs)
            up.add(node)
            if ready is None and len(up) >= setting.nodes:
                used, ready = set(sorted(up)[: setting.nodes]), now + setting.start_up
            continue
        if ready is not None and ready + (setting.steps - first_step) * setting.step <= failure.time:
            break
        if failure.node in up:
            seen += 1
            if failure.kind is Kind.NODE:
                up.discard(failure.node)
                heapq.heappush(repairs, (failure.time + setting.notice + setting.repair, failure.node))
            if ready is not None and failure.node in used:
                at = first_step + max(0, int((failure.time - ready) / setting.step))
                saved = max(at - at % setting.checkpoint_steps, first_step)
                recomputed += at - saved
                first_step = saved
                restarts += 1
                used = set(sorted(up)[: setting.nodes])
                whole = len(used) == setting.nodes
                ready = failure.time + notice[failure.kind] + setting.start_up if whole else None
        failure = next(failures)
    finished = failure.time < GIVEN_UP * setting.ideal
    assert ready is not None or not finished
    wall = ready + (setting.steps - first_step) * setting.step if finished and ready is not None else failure.time
    return Outcome(
        failures=seen,
        wall_days=wall / DAY,
        over_ideal=wall / setting.ideal - 1,
        utilisation=(setting.steps if finished else first_step) * setting.step / wall,
        restarts=restarts * setting.workers,
        recomputed=recomputed / setting.steps,
        finished=finished,
    )
