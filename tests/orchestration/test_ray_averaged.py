"""Averaged stems on a private Ray cluster of this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import RunConfig
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.ray_cluster import connect
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.run_directory import RunDirectory

MakeConfig = Callable[..., RunConfig]
DigestOf = Callable[[Path], str]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    here = connect()
    yield
    here.close()


class Killer:
    """Kills the worker of block 1 once, after its first checkpoint."""

    def __init__(self) -> None:
        self.killed = False

    def update(self, snapshot: Snapshot) -> None:
        block = snapshot.blocks[1]
        if block.state is BlockState.RUNNING and block.checkpoint_step > 0 and block.pid and not self.killed:
            os.kill(block.pid, signal.SIGKILL)
            self.killed = True


def meetings(path: Path, block: int, attempt: int = 1) -> list[dict[str, Any]]:
    lines = RunDirectory.open(path).block(block).metrics()
    return [meeting for line in lines if line["attempt"] == attempt for meeting in line["meetings"]]


def test_undisturbed_runs_have_one_digest(tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf) -> None:
    config = make_config(blocks={"stem": "averaged", "average_every": 5})
    paths = [tmp_path / "first", tmp_path / "second"]
    for path in paths:
        assert train_run(config, path, backend="ray").ok
    schedule = [{"meeting": m, "step": 5 * (m + 1), "blocks": [0, 1, 2]} for m in range(5)]
    assert all(meetings(path, block) == schedule for path in paths for block in range(3))
    assert digest_of(paths[0]) == digest_of(paths[1])


@pytest.mark.long
def test_a_killed_worker_is_skipped_and_comes_again(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(
        training={"steps": 4000, "batch_size": 16},
        blocks={"stem": "averaged", "average_every": 10},
        checkpoints={"every": 20},
        logging={"every": 50},
    )
    killer = Killer()
    result = train_run(config, tmp_path, backend="ray", watch=killer)
    assert result.ok
    assert killer.killed
    assert [block.restarts for block in result.blocks] == [0, 1, 0]
    for block in (0, 2):
        told = [line["blocks"] for line in meetings(tmp_path, block) if "blocks" in line]
        assert told[0] == [0, 1, 2]
        assert [0, 2] in told  # without the one that was away
    assert [0, 1, 2] in [line.get("blocks") for line in meetings(tmp_path, 1, attempt=2)]
