"""The run's journal: one line for every change of a block's state. Only the driver writes there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from dbtrain.errors import NoRoom, UserError
from dbtrain.orchestration.events import Event, WorkerError
from dbtrain.orchestration.state import LIVE, BlockState, BlockStatus
from dbtrain.run_directory import RunDirectory

_log = logging.getLogger(__name__)


class Journal:
    """Appends to events.jsonl. A full disk, or storage that is away, holds lines back and nobody up."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._held: list[Mapping[str, Any]] = []
        self._begun = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, behind those that are held back.

        Raises:
            UserError: not even the first line can be written, for another reason than a full disk.
        """
        self._held.append(line)
        self.flush()

    def flush(self) -> None:
        """Try again to write what is held back."""
        first_time = len(self._held) == 1
        while self._held:
            try:
                self._run.journal(self._held[0])
            except UserError as error:
                if not self._begun and not isinstance(error, NoRoom):
                    raise
                if first_time:
                    _log.warning("the journal cannot be written just now: %s", error)
                return
            self._begun = True
            del self._held[0]

    def close(self) -> None:
        """Write what is held back, or say that it is lost: the run itself does not depend on it."""
        self.flush()
        if self._held:
            _log.warning("the last %d lines of the journal could not be written", len(self._held))


def describe(before: BlockStatus, after: BlockStatus, event: Event) -> Iterator[dict[str, Any]]:
    """The lines for what `event` made of a block; none when nothing happened that is worth one."""
    line: dict[str, Any] = {"block": after.index, "attempt": after.attempt, "step": after.step}
    if after.rollbacks > before.rollbacks:
        yield {"event": "block_rolled_back", **line, "rollbacks": after.rollbacks}
    if after.trouble is not None and before.trouble is None:
        yield {"event": "block_waiting", **line, "reason": after.trouble}
    if after.slow is not None and before.slow is None:
        yield {"event": "block_slow", **line, "node": after.node, "reason": after.slow}
    if after.replicas != before.replicas:
        yield {"event": "block_scaled", **line, "replicas": after.replicas}
    if after.leaving is not None and before.leaving is None:
        yield {"event": "block_leaving", **line, "reason": after.leaving}
    if before.state is not after.state:
        yield {"event": f"block_{after.state}", **line, **_details(before, after, event)}


def _details(before: BlockStatus, after: BlockStatus, event: Event) -> dict[str, Any]:
    details: dict[str, Any] = {}
    match after.state:
        case BlockState.STARTING:
            details = {"restarts": after.restarts, "replicas": after.seats}
            if after.until is not None:
                details["until"] = after.until
        case BlockState.RUNNING:
            details = {"pid": after.pid, "node": after.node, "node_id": after.node_id, "device": after.device}
        case BlockState.RESTARTING:
            details = {"reason": after.reason, "backoff": round(after.retry_at - after.since, 3)}
        case BlockState.PAUSED if before.leaving is not None:
            details = {"reason": before.leaving}
        case BlockState.FAILED | BlockState.STOPPED if after.reason is not None:
            details = {"reason": after.reason}
    if isinstance(event, WorkerError) and event.block == after.index and before.state in LIVE:
        details |= {"rows": list(event.rows), "traceback": event.traceback}
    return details
