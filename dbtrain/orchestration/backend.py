"""What the driver asks of a backend: start, stop and end workers, and tell what happened to them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Protocol

from dbtrain.errors import UserError
from dbtrain.orchestration.events import Node, StartWorker, WorkerEvent

Clock = Callable[[], float]
"""Seconds that never fall, such as `time.monotonic`."""


class Backend(Protocol):
    """Runs workers. Only `poll` may wait, and no longer than it is told to."""

    name: str
    replicates: bool
    """Whether several workers can train one block together."""

    def nodes(self) -> tuple[Node, ...]:
        """The nodes there are now, and how many workers fit on each.

        Raises:
            RunInterrupted: the cluster is gone.
        """
        ...

    def facts(self) -> Mapping[str, object]:
        """What the journal should know of the place, e.g. where the workers' logs are."""
        ...

    def attach(self, run_uri: str) -> None:
        """Name the run directory that workers open; called once, before the first `start`."""
        ...

    def start(self, order: StartWorker) -> None:
        """Start a worker, or several for one block, and return at once; `poll` tells what became of them."""
        ...

    def stop(self, block: int, attempt: int) -> None:
        """Ask a worker to finish its step, save and leave."""
        ...

    def kill(self, block: int, attempt: int) -> None:
        """End a worker at once; `poll` tells nothing more of it."""
        ...

    def poll(self, timeout: float) -> list[WorkerEvent]:
        """What happened since the last call. Waits up to `timeout` seconds for something to happen."""
        ...

    def close(self) -> None:
        """End all workers and give back what the backend holds. May be called twice."""
        ...


def reason_of(error: BaseException) -> str:
    """One sentence for the journal and the table: a user's mistake as it is, a bug with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def traceback_of(error: BaseException) -> str:
    """The traceback as text, for the journal."""
    return "".join(traceback.format_exception(error))
