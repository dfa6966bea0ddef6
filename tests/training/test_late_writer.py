"""A worker that is frozen, replaced, and wakes up again: a process of its own, in the middle of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.training.trainer import BlockTrainer

PATIENCE = 100.0  # seconds
EVERY = 20
# Freezes between two steps, when nothing is being written: of what a process has begun to write when it is frozen, its
# successor may see the end (a line of metrics), or wait for it for a while (a folder that is being replaced).
_OLD = f"""
import os, signal, sys
from dbtrain.run_directory import RunDirectory
from dbtrain.training.trainer import BlockTrainer

frozen = False
for report in BlockTrainer(RunDirectory.open(sys.argv[1]), 0, attempt=1).train():
    if not frozen and 0 < report.checkpoint_step == report.step - report.step % {EVERY}:
        frozen = True
        os.kill(os.getpid(), signal.SIGSTOP)
"""


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _is_frozen(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("telling", [1, 50])
def test_an_old_worker_wakes_up(small_config: Callable[..., RunConfig], tmp_path: Path, telling: int) -> None:
    # Metrics are told more often than checkpoints are saved, or the other way round: either is refused first.
    config = small_config(training={"steps": 100_000}, checkpoints={"every": EVERY}, logging={"every": telling})
    run = start_run(config, tmp_path / "run")
    block = tmp_path / "run" / "blocks" / "00"
    with subprocess.Popen([sys.executable, "-c", _OLD, run.uri], stderr=subprocess.PIPE, text=True) as old:
        deadline = time.monotonic() + PATIENCE
        while not _is_frozen(old.pid):
            assert old.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with closing(BlockTrainer(run, 0, attempt=2)) as newer:
            first = newer.step
            for report in newer.train():
                if report.step >= first + 50:
                    newer.request_stop()
        before = _content(block)
        os.kill(old.pid, signal.SIGCONT)
        error = old.communicate(timeout=PATIENCE)[1]
    assert old.returncode == 1
    assert error.splitlines()[-1].startswith("dbtrain.run_directory.StaleAttempt: ")
    assert "belongs to attempt 2; attempt 1 may not write there" in error
    assert _content(block) == before
