"""Samples for the page: drawn from time to time by a process of low priority, or those that `dbtrain sample` left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbtrain.monitoring.pictures import checked_png, kept_png
from dbtrain.monitoring.run_view import RunView
from dbtrain.run_directory import RunDirectory

_LOOK = 10.0
"""Seconds between two looks for a picture."""
_PATIENCE = 1800.0
"""Seconds after which a process that draws is ended."""


class Gallery:
    """What there is to show. This one shows the picture that `dbtrain sample` left in the run directory, if any."""

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.monotonic):
        self.png: bytes | None = None
        self._run = run
        self._clock = clock
        self._next = clock()
        self._version = 0

    def look(self, view: RunView) -> dict[str, Any]:
        """What to tell of samples now; `version` changes with the picture."""
        if self._clock() >= self._next:
            self._next = self._clock() + _LOOK
            self._show(kept_png(self._run))
        return {"status": "off" if self.png is None else "kept", **self._picture()}

    def _picture(self) -> dict[str, Any]:
        return {"picture": self.png is not None, "version": self._version}

    def _show(self, png: bytes | None) -> None:
        if png != self.png:
            self.png = png
            self._version += 1


class Studio(Gallery):
    """Draws anew whenever a block has a new checkpoint, at most every `every` seconds.

    The work is done by another process, which assembles the newest checkpoints in a folder of its own: neither the run
    directory nor whoever asks for the page notices.
    """

    def __init__(self, run: RunDirectory, every: float):
        super().__init__(run)
        self.every = every
        self._steps: tuple[int, ...] = ()
        self._told: dict[str, Any] = {"status": "waiting", "every": every}
        self._new = threading.Event()
        self._closing = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._drawn: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._work, name="samples", daemon=True)
        self._thread.start()

    def look(self, view: RunView) -> dict[str, Any]:
        """What to tell now; new checkpoints set the work going."""
        self._steps = tuple(block.checkpoint_step for block in view.blocks)
        if all(self._steps) and self._steps != self._drawn:
            self._new.set()
        return {**self._told, **self._picture()}

    def close(self) -> None:
        """End the process that draws, if any."""
        self._closing.set()
        self._new.set()
        if self._child is not None:
            self._child.kill()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._new.wait()
            if self._closing.is_set():
                return
            self._new.clear()
            if self._steps != self._drawn:
                self._drawn = self._steps
                self._told = {**self._told, "status": "drawing", "problem": None}
                try:
                    with tempfile.TemporaryDirectory(prefix="dbtrain-samples-") as folder:
                        self._draw(Path(folder))
                except (OSError, ValueError) as error:  # such as a full disk; the next checkpoint is another try
                    self._told = {**self._told, "status": "failed", "problem": str(error)}
            if "about" in self._told or self._closing.wait(self.every):
                return  # closed, or the model makes nothing that could be shown

    def _draw(self, folder: Path) -> None:
        """Have samples drawn in `folder`, and take them over. Raises OSError or ValueError where that fails."""
        command = [sys.executable, "-m", "dbtrain.monitoring.web.draw", self._run.uri, str(folder)]
        # One thread: what trains may be on this machine.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (folder / "complaints").open("w+b") as complaints:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=complaints, env=environment
            )
            if self._closing.is_set():  # between the look above and the start
                self._child.kill()
            try:
                code = self._child.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._child.kill()
                code = self._child.wait()
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
        if code != 0:
            raise OSError(lines[-1][:300] if lines else f"drawing ended with {code}")
        answer = json.loads((folder / "answer.json").read_text())
        picture = folder / "samples.png"
        self._show(checked_png(picture.read_bytes()) if picture.exists() else None)
        self._told = {"status": "drawn", "every": self.every, "at": time.time(), **answer}


@contextmanager
def gallery_of(run: RunDirectory, every: float | None) -> Iterator[Gallery]:
    """A gallery that draws every so many seconds, or shows what is there."""
    if every is None:
        yield Gallery(run)
        return
    studio = Studio(run, every)
    try:
        yield studio
    finally:
        studio.close()
