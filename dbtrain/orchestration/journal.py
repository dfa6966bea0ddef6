"""One line of the run's journal for every change of a block's state. Only the driver writes there."""

from __future__ import annotations

from typing import Any

from dbtrain.orchestration.coordinator import LIVE, BlockState, BlockStatus
from dbtrain.orchestration.events import Event, WorkerError


def describe(before: BlockStatus, after: BlockStatus, event: Event) -> dict[str, Any] | None:
    """The line for what `event` made of a block; None when its state stayed the same."""
    if before.state is after.state:
        return None
    line: dict[str, Any] = {
        "event": f"block_{after.state}",
        "block": after.index,
        "attempt": after.attempt,
        "step": after.step,
    }
    match after.state:
        case BlockState.STARTING:
            line["restarts"] = after.restarts
        case BlockState.RUNNING:
            line |= {"pid": after.pid, "node": after.node, "device": after.device}
        case BlockState.RESTARTING:
            line |= {"reason": after.reason, "backoff": round(after.retry_at - after.since, 3)}
        case BlockState.FAILED | BlockState.STOPPED if after.reason is not None:
            line["reason"] = after.reason
    if isinstance(event, WorkerError) and event.block == after.index and before.state in LIVE:
        line["traceback"] = event.traceback
    return line
