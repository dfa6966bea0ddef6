"""What a run directory says of its run, for whoever looks at it from outside: during, after, and for runs of others.

`RunReader` follows the journal and the metrics and keeps a `RunView`; nothing is written, and the driver is not asked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dbtrain.monitoring.curve import Curve
from dbtrain.monitoring.lines import LineFollower, is_count, is_time
from dbtrain.orchestration.lock import driver_at_work
from dbtrain.orchestration.state import LIVE, BlockState
from dbtrain.plan import BlockPlan
from dbtrain.run_directory import EVENTS, METRICS, RunDirectory

NOTICES = 1000
"""Events that are kept for those who look, the newest ones."""
RECENT = 50
"""Lines of a block's metrics that are kept as they stand there, the newest ones."""


class RunState(StrEnum):
    """Where a run stands."""

    NEW = "new"
    """No driver has begun it."""
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    """Ended, with at least one block given up."""
    STOPPED = "stopped"
    """Left on request."""
    INTERRUPTED = "interrupted"
    """Its driver is gone without an end; starting it again goes on."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened, in words."""

    time: float
    """Seconds since 1970."""
    kind: str
    """As the journal calls it, such as block_restarting."""
    block: int | None
    text: str
    """Written by workers too, whose reasons may hold anything: escape it where it could be taken for markup."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a block's curve where something happened."""

    time: float
    step: int
    kind: str
    """restart, rollback or failure."""
    text: str


@dataclass(slots=True)
class BlockView:
    """What is known of one block."""

    layout: BlockPlan
    total: int
    """Steps there are to train."""
    state: BlockState = BlockState.PENDING
    attempt: int = 0
    restarts: int = 0
    """New workers after ones that were lost, in all starts of the run."""
    rollbacks: int = 0
    replicas: int = 1
    """Workers it has or had last."""
    node: str | None = None
    device: str | None = None
    pid: int | None = None
    step: int = 0
    loss: float = math.nan
    """Mean since the line before."""
    grad_norm: float = math.nan
    lr: float = math.nan
    samples_per_second: float = math.nan
    """Since the line before; of a worker that has told something, dead or alive."""
    peak_memory: int | None = None
    """Bytes; None for runs of an earlier version."""
    checkpoint_step: int = 0
    checkpoint_at: float | None = None
    """When this checkpoint was first told of, seconds since 1970."""
    heard_at: float | None = None
    """Newest line of metrics, seconds since 1970."""
    reason: str | None = None
    """Of the newest trouble."""
    losses: Curve = field(default_factory=Curve)
    rates: Curve = field(default_factory=Curve)
    """Samples per second."""
    marks: list[Mark] = field(default_factory=list)
    recent: list[dict[str, Any]] = field(default_factory=list)
    """Its newest lines of metrics, as they stand there; roll-backs are among them."""

    @property
    def index(self) -> int:
        """0 has the highest noise."""
        return self.layout.index

    @property
    def running(self) -> bool:
        """Whether a worker trains it now."""
        return self.state is BlockState.RUNNING

    @property
    def flops_per_second(self) -> float:
        """Floating-point operations a second, matrix products alone; NaN where nothing is told."""
        return self.samples_per_second * self.layout.flops_per_sample

    @property
    def fraction(self) -> float:
        """Share of the steps that are done."""
        return self.step / self.total


@dataclass(slots=True)
class RunView:
    """A run as its directory shows it. Belongs to its reader, which changes it at the next `read`."""

    uri: str
    name: str
    kind: str
    """blocks or end_to_end."""
    batch_size: int
    blocks: list[BlockView]
    state: RunState = RunState.NEW
    starts: int = 0
    """Drivers that have begun it."""
    started_at: float | None = None
    """When the newest of them began, seconds since 1970."""
    first_started_at: float | None = None
    ended_at: float | None = None
    """When it ended or fell silent; None while it runs."""
    heard_at: float | None = None
    """Newest line of the journal or of any block."""
    backend: str = "-"
    slots: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    """Workers that fit, by node."""
    driver: str = "-"
    """Process and machine of the driver."""
    worker_logs: str | None = None
    """Folder of the workers' logs on the driver's machine, where the run has a cluster of its own."""
    notices: list[Notice] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        """Share of all steps of all blocks that are done."""
        return sum(min(block.fraction, 1.0) for block in self.blocks) / len(self.blocks)

    @property
    def all_seconds_left(self) -> float:
        """Until all blocks are done that were not given up, at the speed of those that run; infinity where none does.

        Waiting blocks are taken to go on as fast as those that run now, when these make room.
        """
        ended = (BlockState.FINISHED, BlockState.FAILED)
        left = sum(max(block.total - block.step, 0) for block in self.blocks if block.state not in ended)
        running = [block for block in self.blocks if block.running and block.samples_per_second > 0]
        if left == 0:
            return 0.0
        if not running:
            return math.inf
        together = self.batch_size * left / math.fsum(block.samples_per_second for block in running)
        return max(together, *(self.seconds_left(block) for block in running))

    def seconds_left(self, block: BlockView) -> float:
        """Until the block is done at its newest speed; infinity where it does not run."""
        if block.state is BlockState.FINISHED:
            return 0.0
        if not block.running or not block.samples_per_second > 0:
            return math.inf
        return (block.total - block.step) * self.batch_size / block.samples_per_second


class RunReader:
    """Follows a run directory."""

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.time):
        self.run = run
        self.clock = clock
        plan = run.plan
        blocks = [BlockView(layout, plan.steps) for layout in plan.blocks]
        self.view = RunView(run.uri, run.config.name, plan.kind, plan.batch_size, blocks)
        self._journal = LineFollower(run.storage, EVENTS)
        self._metrics = [LineFollower(run.block(b.index).storage, METRICS) for b in plan.blocks]
        self._ended = False
        self._waiting: dict[int, int] = {}
        """Step of each block that told that it waits for something, such as room on a disk."""

    def read(self) -> RunView:
        """Take in what is new.

        Raises:
            OSError: the directory is there no more, or cannot be read just now.
        """
        if not self.run.storage.exists(""):
            raise FileNotFoundError(f"{self.run.uri} is not there any more")
        # Before its lines: a driver that ends in between has written them all, and is not taken for one that died.
        at_work = driver_at_work(self.run.storage)
        for line in self._journal.read():
            try:
                self._take_event(line)
            except (KeyError, TypeError, ValueError, IndexError, OverflowError):
                continue  # written by another version, or by nobody of ours
        for block, follower in zip(self.view.blocks, self._metrics, strict=True):
            for line in follower.read():
                try:
                    self._take_metrics(block, line)
                except (KeyError, TypeError, ValueError, OverflowError):
                    continue
                block.recent.append(line)
            del block.recent[:-RECENT]
        # And after them, for one that has begun in between.
        self._judge(at_work or driver_at_work(self.run.storage))
        return self.view

    def _take_event(self, line: dict[str, Any]) -> None:
        kind, when = str(line["event"]), _time(line["time"])
        view = self.view
        block = None
        if "block" in line:
            if not 0 <= int(line["block"]) < len(view.blocks):
                raise IndexError(line["block"])
            block = view.blocks[line["block"]]
            self._take_block_event(block, kind, when, line)
        elif kind == "run_started":
            view.driver = f"process {line['pid']} on {line['node']}"
            view.backend, view.slots = str(line["backend"]), int(line["slots"])
            view.starts += 1
            view.started_at = when
            view.first_started_at = view.first_started_at or when
            view.nodes = dict(line.get("nodes", {}))
            folder = line.get("worker_logs")
            view.worker_logs = None if folder is None else str(folder)
            self._ended = False
            for other in view.blocks:
                if other.state is not BlockState.FINISHED:
                    other.state, other.pid = BlockState.PENDING, None
        elif kind == "nodes_changed":
            view.nodes = dict(line["nodes"])
        elif kind in ("run_ended", "run_interrupted"):
            self._ended = kind == "run_ended"
            view.ended_at = when
        view.heard_at = max(view.heard_at or when, when)
        view.notices.append(Notice(when, kind, None if block is None else block.index, _words(line)))
        del view.notices[:-NOTICES]

    def _take_block_event(self, block: BlockView, kind: str, when: float, line: dict[str, Any]) -> None:
        state = kind.removeprefix("block_")
        block.attempt = int(line["attempt"])
        self._waiting.pop(block.index, None)
        reason = line.get("reason")
        if state in set(BlockState):
            block.state = BlockState(state)
        match state:
            case "running":
                block.pid, block.node, block.device = int(line["pid"]), str(line["node"]), str(line["device"])
                block.reason = None
            case "starting":
                block.replicas = int(line.get("replicas", 1))
            case "restarting":
                block.restarts += 1
                block.marks.append(Mark(when, _count(line["step"]), "restart", str(reason)))
            case "failed":
                block.marks.append(Mark(when, _count(line["step"]), "failure", str(reason)))
            case "rolled_back":
                # Every driver tells anew of those that a checkpoint remembers.
                if int(line["rollbacks"]) > block.rollbacks:
                    block.marks.append(Mark(when, _count(line["step"]), "rollback", "values were not finite"))
                block.rollbacks = int(line["rollbacks"])
            case "waiting":
                self._waiting[block.index] = _count(line["step"])
            case "finished":
                block.step = _count(line["step"])
                block.checkpoint_step, block.checkpoint_at = block.step, when
        if reason is not None:
            block.reason = str(reason)

    def _take_metrics(self, block: BlockView, line: dict[str, Any]) -> None:
        when = _time(line["time"])
        if "event" in line:
            return  # a roll-back, which the journal tells as well
        step, loss = _count(line["step"]), _number(line["loss"])
        rate = _number(line["samples_per_second"])
        block.losses.add(step, loss)
        block.rates.add(step, rate)
        block.step, block.loss, block.samples_per_second = step, loss, rate
        block.grad_norm, block.lr = _number(line["grad_norm"]), _number(line["lr"])
        peak = line.get("peak_memory")
        block.peak_memory = None if peak is None else int(peak)
        # The journal is read first, and knows more of a block that is done.
        if block.state is not BlockState.FINISHED and line["checkpoint_step"] != block.checkpoint_step:
            block.checkpoint_step, block.checkpoint_at = int(line["checkpoint_step"]), when
        waiting = self._waiting.get(block.index)
        if waiting is not None and step > waiting and line["checkpoint_step"] >= waiting:
            # The journal does not tell that it is over; that a checkpoint came about since does.
            del self._waiting[block.index]
            block.reason = None
        block.heard_at = when
        self.view.heard_at = max(self.view.heard_at or when, when)

    def _judge(self, at_work: bool) -> None:
        """What state the run is in; a driver that died did not say so."""
        view = self.view
        if view.starts == 0:
            return
        states = {block.state for block in view.blocks}
        if self._ended:
            if states == {BlockState.FINISHED}:
                view.state = RunState.FINISHED
            else:
                view.state = RunState.FAILED if BlockState.FAILED in states else RunState.STOPPED
        elif at_work:
            view.state, view.ended_at = RunState.RUNNING, None
        else:
            view.state, view.ended_at = RunState.INTERRUPTED, view.heard_at
            for block in view.blocks:
                if block.state in LIVE or block.state is BlockState.RESTARTING:
                    block.state = BlockState.STOPPED
                    block.reason = block.reason or "the driver is gone"


_NOT_SAID = frozenset({"event", "time", "block", "traceback", "pid", "request", "node_id", "attempt", "step"})


def _words(line: dict[str, Any]) -> str:
    """An event in words: its name, the step, and what else it says."""
    words = str(line["event"]).removeprefix("block_").replace("_", " ")
    if "step" in line:
        words += f" at step {line['step']}"
    said = [f"{name} {_short(value)}" for name, value in line.items() if name not in _NOT_SAID and name != "reason"]
    if "reason" in line:
        said.append(str(line["reason"]))
    return f"{words}: {', '.join(said)}" if said else words


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return str(len(value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _time(value: Any) -> float:
    if not is_time(value):
        raise ValueError(value)
    return float(value)


def _count(value: Any) -> int:
    if not is_count(value):
        raise ValueError(value)
    return int(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
