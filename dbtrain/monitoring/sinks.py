"""The driver's side of W&B and TensorBoard: a process for each, which nobody waits for before the run has ended.

What such a process does is in `dbtrain.monitoring.forward`. Neither library is ever imported by a process that trains.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.orchestration.driver import Snapshot
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import Storage

SinkName = Literal["wandb", "tensorboard", "assembly"]
"""`assembly` is W&B's run of the whole model, made when it is evaluated."""

FOLDER = "monitoring"
"""Of the run directory: the logs of these processes, and what they have to remember."""
_LABELS: dict[SinkName, str] = {"wandb": "W&B", "tensorboard": "TensorBoard", "assembly": "W&B"}
_REASON_BYTES = 4096
_KILL_SECONDS = 5.0  # more than the kernel needs, unless a disk has gone

_log = logging.getLogger(__name__)


def check_sinks(config: RunConfig, storage: Storage) -> None:
    """Whether what the section `monitoring` asks for can be had.

    Raises:
        UserError: a library is not installed, or TensorBoard's files would not be on this machine.
    """
    wanted = config.monitoring
    if wanted.wandb != "off":
        _check_installed("wandb", wanted.wandb)
    if wanted.tensorboard:
        _check_installed("tensorboard", True)
        if storage.local_path is None:
            raise UserError(
                f"TensorBoard's files need a run directory on this machine, not {storage.uri}",
                field="monitoring.tensorboard",
                value=True,
                mend="turn it off, or choose a local run directory",
            )


def _check_installed(name: str, value: object) -> None:
    found = importlib.util.find_spec(name)
    # A folder of that name without code in it, such as the one that W&B leaves where it was started, is found as well.
    if found is None or found.origin is None:
        raise UserError(
            f"{name} is not installed here",
            field=f"monitoring.{name}",
            value=value,
            mend=f"pip install 'dbtrain[{name}]'",
        )


class Sinks:
    """The sinks of a run that trains. Looks on as a `Watcher`, to tell of one that has broken; never raises."""

    def __init__(self, run: RunDirectory):
        wanted = run.config.monitoring
        names: list[SinkName] = []
        if wanted.wandb != "off":
            names.append("wandb")
        if wanted.tensorboard:
            names.append("tensorboard")
        self._patience = wanted.patience
        self._running = [process for name in names if (process := _Process.start(name, run)) is not None]

    def update(self, snapshot: Snapshot) -> None:
        """Drop whoever has ended before the run."""
        for process in list(self._running):
            if process.ended:
                process.tell_of_failure()
                self._running.remove(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let them send what is left, and wait for it; not behind an exception, where they end by themselves."""
        for process in self._running:
            process.finish()
        if kind is None:
            _wait(self._running, self._patience)


def send_assembly(run: RunDirectory) -> None:
    """Give W&B the run's newest evaluation and its model, if the run's configuration wants it; never raises."""
    if run.config.monitoring.wandb == "off":
        return
    try:
        _check_installed("wandb", run.config.monitoring.wandb)
    except UserError as error:
        _log.warning("%s", error)
        return
    process = _Process.start("assembly", run)
    if process is not None:
        process.finish()
        _wait([process], run.config.monitoring.patience)


def _wait(processes: list[_Process], patience: float) -> None:
    """Until all have ended, for `patience` seconds at most, or until somebody has enough of it."""
    deadline = time.monotonic() + patience
    with contextlib.suppress(KeyboardInterrupt):
        for process in processes:
            process.wait(deadline, patience)


class _Process:
    """One of `dbtrain.monitoring.forward`. The end of its standard input tells it that the run has ended."""

    def __init__(self, name: SinkName, process: subprocess.Popen[bytes], log: Path):
        self._name = name
        self._process = process
        self._log = log

    @classmethod
    def start(cls, name: SinkName, run: RunDirectory) -> _Process | None:
        """Start it; None, and a warning, if that is not possible."""
        patience = run.config.monitoring.patience
        command = [sys.executable, "-m", "dbtrain.monitoring.forward", name, run.uri, f"{patience:g}"]
        try:
            log = _log_file(name, run.storage)
            with log.open("ab") as output:
                # In a session of its own Ctrl-C does not reach it, and it can be ended with all that it started.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError as error:
            _log.warning("%s is left out: %s", _LABELS[name], error)
            return None
        return cls(name, process, log)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self) -> None:
        """Say that nothing more will come."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self, deadline: float, patience: float) -> None:
        """Until it has ended, or the deadline (of `time.monotonic`) has come: then it is killed."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(_KILL_SECONDS)
            _log.warning(
                "%s has not taken everything within the %g s of monitoring.patience and is given up; log: %s",
                _LABELS[self._name],
                patience,
                self._log,
            )
            return
        if self._process.returncode != 0:
            self.tell_of_failure()

    def tell_of_failure(self) -> None:
        """One warning, with the last that it said."""
        _log.warning(
            "%s has failed and is left out from here on, training is not affected: %s; log: %s",
            _LABELS[self._name],
            _last_line(self._log) or f"it ended with {self._process.returncode}",
            self._log,
        )


def _log_file(name: SinkName, storage: Storage) -> Path:
    """Raises OSError where there can be none."""
    if storage.local_path is None:
        handle, path = tempfile.mkstemp(prefix=f"dbtrain-{name}-", suffix=".log")
        os.close(handle)
        return Path(path)
    folder = storage.local_path / FOLDER
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.log"


def _last_line(log: Path) -> str | None:
    try:
        lines = log.read_bytes()[-_REASON_BYTES:].decode(errors="replace").split("\n")
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
