"""Asking a run to stop: from a signal, a watcher, or any other thread."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what `kill`, Ray's job server and Kubernetes send; and what Slurm is asked to send before time is up."""


class StopToken:
    """Remembers that somebody wants the run to stop. Safe to use from signal handlers and threads."""

    def __init__(self) -> None:
        # A plain flag: a lock could be held by the very code that a signal handler interrupts.
        self._requested = False
        self._listeners: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        """Whether `request` has been called."""
        return self._requested

    def request(self) -> None:
        """Ask for the stop. Further calls change nothing."""
        if not self._requested:
            self._requested = True
            for listener in self._listeners:
                listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called by who makes the request, maybe a signal handler: only set a flag there."""
        self._listeners.append(listener)


@contextlib.contextmanager
def stop_on_signals(token: StopToken) -> Iterator[None]:
    """The first of `SIGNALS` requests a stop, the second raises KeyboardInterrupt on the spot.

    Handlers that were there before are put back at the end. Outside the main thread, where Python allows no
    handlers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    seen = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            raise KeyboardInterrupt
        token.request()

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
