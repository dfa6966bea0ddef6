"""A thread that keeps looking at a run: its storage may be slow, or hang, while a screen has to answer."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType

from dbtrain.errors import UserError
from dbtrain.monitoring.curve import Curve
from dbtrain.monitoring.run_view import BlockView, RunReader, RunView
from dbtrain.run_directory import RunDirectory

POINTS = 64
"""Of a block's curve, in a frame: as many as a line of text shows."""
PATIENCE = 0.5
"""Seconds to wait for the end of a look that nobody wants any more."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A run at one moment. Nobody changes it."""

    view: RunView
    at: float
    """When it was read, seconds since 1970."""
    problem: str | None = None
    """Why the run directory cannot be read just now; the view is what was read last."""


class Looker:
    """Looks at a run now and then. Its directory may be away for a time, and come back as another run."""

    def __init__(self, run: RunDirectory):
        self._reader = RunReader(run)
        self._stale = False

    @property
    def run(self) -> RunDirectory:
        """The one that was there at the last look, or before."""
        return self._reader.run

    @property
    def view(self) -> RunView:
        """As it was read last."""
        return self._reader.view

    def look(self) -> str | None:
        """Read what is new; why that cannot be done just now, in one line, or None."""
        try:
            # What was away may come back as another run, with other lines.
            if self._stale and self.run.storage.exists(""):
                self._reader = RunReader(RunDirectory.open(self.run.uri))
            self._reader.read()
        except FileNotFoundError:
            problem = "the directory is not there any more"
        except OSError as error:
            problem = error.strerror or str(error)
        except UserError as error:
            problem = error.problem
        else:
            self._stale = False
            return None
        self._stale = True
        return " ".join(problem.split())


class Follower:
    """Reads a run every so many seconds while it is entered."""

    def __init__(self, run: RunDirectory, every: float):
        self._looker = Looker(run)
        self._every = every
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._frame = self._look()
        self.descriptor, self._bell = os.pipe()
        """Has something to read when there is a new frame."""
        os.set_blocking(self.descriptor, False)
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        if not self._thread.is_alive():
            os.close(self.descriptor)
            os.close(self._bell)

    def newest(self) -> Frame:
        """The newest frame.

        Raises:
            BaseException: whatever ended the thread, which is a bug.
        """
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 4096)
        if self._error is not None:
            raise self._error
        return self._frame

    def _follow(self) -> None:
        try:
            while not self._over.wait(self._every):
                self._frame = self._look()
                os.write(self._bell, b".")
        except BaseException as error:
            self._error = error
            os.write(self._bell, b".")

    def _look(self) -> Frame:
        problem = self._looker.look()
        return Frame(_copied(self._looker.view), time.time(), problem)


def _copied(view: RunView) -> RunView:
    """What the reader will not change any more."""
    blocks = [_copied_block(block) for block in view.blocks]
    return replace(view, blocks=blocks, notices=list(view.notices), nodes=dict(view.nodes))


def _copied_block(block: BlockView) -> BlockView:
    losses = Curve()
    losses.steps, losses.values = block.losses.thinned(POINTS)
    return replace(block, losses=losses, rates=Curve(), marks=list(block.marks), recent=list(block.recent))
