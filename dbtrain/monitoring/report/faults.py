"""What disturbed a run and what it cost, from its journal and from what its workers wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dbtrain.monitoring.lines import is_count, is_time

Line = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One disturbance."""

    time: float
    """Seconds since 1970."""
    kind: str
    """restart, roll-back, given up, waiting, slow, moved, node lost, node joined, driver started again."""
    block: int | None
    """None where it was none's alone."""
    reason: str
    """May come from a worker, and hold anything."""
    step: int | None = None
    """Finished steps of the block, as far as anybody was told."""
    lost: int | None = None
    """Steps that had to be done again, by all blocks together where it hit them all; None where nobody knows."""
    seconds: float | None = None
    """Until the block, or the first of them all, trained again; None where none stood still or went on."""


@dataclass(frozen=True)
class BlockLines:
    """What a block's workers wrote, oldest first."""

    metrics: Sequence[Line]
    workers: Sequence[Line]
    """A line an attempt, from the moment at which it was ready to train; none from earlier versions."""


_SURVIVED = ("restart", "roll-back", "node lost", "driver started again")
_TROUBLES = {
    "block_restarting": "restart",
    "block_failed": "given up",
    "block_waiting": "waiting",
    "block_slow": "slow",
    "block_leaving": "moved",
}


def faults(journal: Sequence[Line], blocks: Sequence[BlockLines]) -> list[Fault]:
    """All of them, oldest first. Lines that no version of ours has written are left out."""
    events = [line for line in journal if is_event(line, len(blocks))]
    found = [_roll_back(index, line) for index, own in enumerate(blocks) for line in own.metrics if _rolls_back(line)]
    nodes: dict[str, Any] | None = None
    for position, event in enumerate(events):
        kind, earlier = event["event"], events[:position]
        if kind == "run_started":
            if nodes is not None:
                found.append(_started_again(earlier, event, events[position + 1 :], blocks))
            nodes = _nodes(event)
        elif kind == "nodes_changed":
            found += _node_changes(event["time"], nodes or {}, _nodes(event))
            nodes = _nodes(event)
        elif kind in _TROUBLES and "block" in event:
            # Of a worker that was lost before it was ready to train, the next one tells what that cost.
            own, until = blocks[event["block"]], _next_start(events[position + 1 :], event["block"])
            found.append(_trouble(_TROUBLES[kind], [*earlier, event], own, until))
    return sorted(found, key=lambda fault: fault.time)


def survived(found: Sequence[Fault]) -> int:
    """How many of them made somebody begin again from a checkpoint or elsewhere."""
    return sum(fault.kind in _SURVIVED for fault in found)


def _trouble(kind: str, events: Sequence[Line], own: BlockLines, until: float) -> Fault:
    event = events[-1]
    reached, lost, seconds = _reached(event["block"], own, events, event["time"]), None, None
    after = _first_ready(own, event["time"], until)
    if kind == "restart" and after is not None:
        lost, seconds = max(0, reached - int(after["step"])), after["time"] - event["time"]
    return Fault(event["time"], kind, event["block"], str(event.get("reason") or "-"), reached, lost, seconds)


def _started_again(before: Sequence[Line], event: Line, later: Sequence[Line], blocks: Sequence[BlockLines]) -> Fault:
    """Another driver took over the run."""
    last = before[-1]
    if last["event"] == "run_ended":
        ends = last.get("blocks")
        states = list(ends.values()) if isinstance(ends, dict) else []
        how = "with a block given up" if "failed" in states else "on request" if "stopped" in states else "otherwise"
        reason = f"the run had ended {how}"
    elif last["event"] == "run_interrupted":
        reason = f"the driver before was interrupted: {last.get('reason') or '-'}"
    else:
        reason = "the driver before was gone without a word"
    lost, first = 0, math.inf
    for index, own in enumerate(blocks):
        after = _first_ready(own, event["time"], _next_start(later, index))
        if after is not None:
            lost += max(0, _reached(index, own, before, event["time"]) - int(after["step"]))
            first = min(first, after["time"])
    if math.isinf(first):
        return Fault(event["time"], "driver started again", None, reason)
    return Fault(event["time"], "driver started again", None, reason, None, lost, first - event["time"])


def _roll_back(index: int, line: Line) -> Fault:
    step, reason = int(line["from_step"]), str(line.get("reason") or "values were not finite")
    return Fault(line["time"], "roll-back", index, reason, step, max(0, step - int(line["step"])))


def _node_changes(time: float, before: dict[str, Any], now: dict[str, Any]) -> list[Fault]:
    lost = [Fault(time, "node lost", None, _node(name)) for name in before if name not in now]
    return lost + [Fault(time, "node joined", None, _node(name)) for name in now if name not in before]


def _node(name: str) -> str:
    """Ray's ids of nodes are long."""
    return f"node {name[:12]}"


def _reached(index: int, own: BlockLines, events: Sequence[Line], time: float) -> int:
    """Steps of the block that were told of by then, by its worker or by the driver."""
    told = [line for line in own.metrics if line["time"] <= time]
    journal = [line for line in events if line.get("block") == index and is_count(line.get("step"))]
    return max((int(last[-1]["step"]) for last in (told, journal) if last), default=0)


def _first_ready(own: BlockLines, since: float, until: float) -> Line | None:
    return next((line for line in own.workers if since <= line["time"] < until), None)


def _next_start(events: Sequence[Line], block: int) -> float:
    """When another driver began, or `block` lost its worker once more."""
    for event in events:
        if event["event"] == "run_started":
            return float(event["time"])
        if event["event"] == "block_restarting" and event.get("block") == block:
            return float(event["time"])
    return math.inf


def _nodes(event: Line) -> dict[str, Any]:
    nodes = event.get("nodes")
    return nodes if isinstance(nodes, dict) else {}


def told(lines: Sequence[Line]) -> list[Line]:
    """Those of a block's lines that have a time and a step."""
    return [line for line in lines if is_time(line.get("time")) and is_count(line.get("step"))]


def is_event(line: Line, blocks: int) -> bool:
    """Whether it is a line of the journal of a run of so many blocks."""
    block = line.get("block", 0)
    known = isinstance(line.get("event"), str) and is_time(line.get("time"))
    return known and is_count(block) and block < blocks


def _rolls_back(line: Line) -> bool:
    return line.get("event") == "rolled_back" and is_count(line.get("from_step"))
