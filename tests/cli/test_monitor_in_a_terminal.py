"""`dbtrain monitor` as somebody uses it: in a real terminal emulator, with a shell around it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import DBTRAIN
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.orchestration.lock import driver_lock
from dbtrain.run_directory import RunDirectory

TMUX = shutil.which("tmux")
pytestmark = [
    pytest.mark.skipif(TMUX is None, reason="no tmux on this machine: the monitor is not tried in a terminal"),
    pytest.mark.timeout(240),
]
PATIENCE = 60.0  # seconds


class Terminal:
    """A tmux server of its own with one window, in which an interactive shell runs."""

    def __init__(self, folder: Path) -> None:
        self._socket = f"dbtrain-{uuid.uuid4().hex[:8]}"
        # As in a shell that exports them, which would hide another size of the window.
        shell = "env COLUMNS=110 LINES=24 PS1='$ ' bash --norc -i"
        self._tmux("new-session", "-d", "-x", "110", "-y", "24", "-c", str(folder), shell)
        self._tmux("set-option", "-g", "escape-time", "0")

    def _tmux(self, *arguments: str) -> str:
        assert TMUX is not None
        command = [TMUX, "-L", self._socket, "-f", "/dev/null", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout

    def type(self, *keys: str) -> None:
        """Press keys by tmux's names; text is typed."""
        self._tmux("send-keys", *keys)

    def screen(self) -> str:
        """What one sees."""
        return self._tmux("capture-pane", "-p")

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def wait_for(self, *texts: str) -> str:
        """The screen, as soon as it shows all of them."""
        deadline = time.monotonic() + PATIENCE
        while not all(text in (screen := self.screen()) for text in texts):
            assert time.monotonic() < deadline, f"{texts} not in\n{screen}"
            time.sleep(0.05)
        return screen

    def close(self) -> None:
        """End it with all that runs in it."""
        self._tmux("kill-server")


@pytest.fixture
def terminal(place: Path) -> Iterator[Terminal]:
    opened = Terminal(place)
    yield opened
    opened.close()


@pytest.fixture
def run(small_config: Callable[..., RunConfig], place: Path) -> Iterator[RunDirectory]:
    """A run that this process drives: block 0 trains."""
    run = start_run(small_config(training={"steps": 1000}), place / "run")
    with driver_lock(run.storage):
        run.journal({"event": "run_started", "backend": "inline", "slots": 3, "pid": os.getpid(), "node": "here"})
        where = {"pid": os.getpid(), "node": "here", "device": "cpu"}
        run.journal({"event": "block_running", "block": 0, "attempt": 1, "step": 0, **where})
        tell(run, 100, 2.0)
        yield run


def tell(run: RunDirectory, step: int, loss: float) -> None:
    values = {"grad_norm": 0.5, "lr": 1e-3, "samples_per_second": 32.0, "checkpoint_step": 0}
    run.block(0).log_metrics({"step": step, "loss": loss, **values})


def process_in(terminal: Terminal) -> int:
    """The monitor's process id, by the shell that runs it."""
    shell = terminal._tmux("display-message", "-p", "#{pane_pid}").strip()
    children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    return int(children[-1])


def test_a_run_is_watched_and_left(run: RunDirectory, terminal: Terminal) -> None:
    terminal.type(f"{DBTRAIN} monitor run --every 0.1; echo left with $?", "Enter")
    terminal.wait_for("small  running", "▸ 0", "100/1000", "2.0000", "3 blocks: 2 pending, 1 running", "q leave")
    tell(run, 200, 1.0)
    terminal.wait_for("200/1000", "1.0000", "█▁", "block 0, 6m 40s left")  # 800 steps of 16 samples at 32 a second

    terminal.type("p")
    terminal.wait_for("small  running  held")
    tell(run, 300, 0.5)
    terminal.type("Down")
    assert "200/1000" in terminal.wait_for("▸ 1")
    terminal.type("p")
    terminal.wait_for("300/1000")

    terminal.type("r", "s")
    terminal.wait_for("sort (state reversed)")
    terminal.type("?")
    terminal.wait_for("the run is not touched")
    terminal.type("Escape")
    terminal.type("g", "Down", "G", "Enter")
    terminal.wait_for("-- journal --", "block 0", "running at step 0", "step 300  loss 0.5000", "keeps no log")
    terminal.type("Escape")
    terminal.wait_for("▸ 0")

    assert "samples/s" in terminal.screen()
    terminal.resize(50, 8)
    assert "samples/s" not in terminal.wait_for("▸ 0", "300/1000", "q leave")
    terminal.resize(110, 24)
    terminal.wait_for("samples/s")

    run.storage.local_path.rename(run.storage.local_path.with_name("away"))  # type: ignore[union-attr]
    terminal.wait_for("cannot be read just now", "is not there any more", "300/1000")
    terminal.type("q")
    assert "▸" not in terminal.wait_for("left with 0")
    terminal.type("stty -a", "Enter")
    flags = terminal.wait_for(" icanon", " echo ", "susp = ^Z")
    assert "Traceback" not in flags


def test_suspended_resumed_and_ended_from_outside(run: RunDirectory, terminal: Terminal) -> None:
    terminal.type(f"{DBTRAIN} monitor run", "Enter")
    terminal.wait_for("100/1000")
    terminal.type("C-z")
    assert "▸" not in terminal.wait_for("Stopped")
    terminal.type("fg", "Enter")
    terminal.wait_for("▸ 0")
    os.kill(process_in(terminal), signal.SIGTERM)
    terminal.wait_for("Stopped", "fg")  # the shell's own screen again
    terminal.type("stty -a", "Enter")
    assert "Traceback" not in terminal.wait_for(" icanon", " echo ", "susp = ^Z")


def test_control_c_leaves_a_finished_run(trained_runs: Path, terminal: Terminal) -> None:
    terminal.type(f"{DBTRAIN} monitor {trained_runs / 'run'}; echo left with $?", "Enter")
    terminal.wait_for("small  finished", "20/20", "100%, 3 blocks: 3 finished")
    terminal.type("C-c")
    assert "Traceback" not in terminal.wait_for("left with 0")
