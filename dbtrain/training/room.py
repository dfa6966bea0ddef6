"""A full disk is waited for: what cannot be written for lack of room is tried again until there is some."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dbtrain.errors import NoRoom

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two tries; each pause is twice as long as the one before."""
_LOOK = 0.1  # seconds between two looks at whether to wait at all

_log = logging.getLogger(__name__)


class Room:
    """Waits for room on behalf of one block. Other threads may read `trouble` and end the waiting."""

    def __init__(self, *, patient: bool = True):
        """Without patience, `write` fails at once."""
        self.trouble: str | None = None
        """What is waited for, in one sentence; None while nothing is."""
        # A plain flag: a lock could be held by the very code that a signal handler interrupts.
        self._over = not patient

    def give_up(self) -> None:
        """Wait no longer, now and later: what finds no room fails. May be called in a signal handler."""
        self._over = True

    def write(self, write: Callable[[], None]) -> None:
        """Have `write` write something, again and again while the disk is full; it removes what is half written.

        Raises:
            NoRoom: there is none, and waiting is given up.
        """
        pause = FIRST_PAUSE
        try:
            while True:
                try:
                    write()
                except NoRoom as error:
                    if self._over:
                        raise
                    if self.trouble is None:
                        self.trouble = f"{error.problem}; waiting for room (free some space, or stop the run)"
                        _log.warning(self.trouble)
                    self._sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                else:
                    if self.trouble is not None:
                        _log.info("there is room again")
                    return
        finally:
            self.trouble = None

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._over and time.monotonic() < end:
            time.sleep(_LOOK)
