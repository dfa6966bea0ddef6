"""Drivers in processes of their own, each with its private cluster, and what signals do to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import RunConfig
from dbtrain.orchestration.run import train_run
from dbtrain.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MakeConfig = Callable[..., RunConfig]
DigestOf = Callable[[Path], str]
PATIENCE = 100.0  # seconds
DRIVER = """
import json, sys
from dbtrain.config_file import parse_config
from dbtrain.orchestration.run import train_run
result = train_run(parse_config(json.loads(sys.argv[1])), sys.argv[2], backend="ray")
print(json.dumps(result.to_json()))
"""


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> RunConfig:
    # Long enough not to be over before a signal has had its effect, also on a fast machine.
    return make_config(training={"steps": 2000}, checkpoints={"every": 50}, logging={"every": 25})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory in which nothing can be written, not even by root."""
    folder = tmp_path_factory.mktemp("home") / "not-a-folder"
    folder.write_text("")
    return folder


def start(config: RunConfig, run: Path, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, config.model_dump_json(), str(run)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(home)},
        start_new_session=True,  # a terminal sends its signals to the whole group
    )


def result_of(driver: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0
    assert len(out.splitlines()) == 1, "standard output holds the result alone"
    result: dict[str, Any] = json.loads(out)
    return result


def newest_steps(run: Path) -> dict[str, str]:
    return {path.parts[-3]: path.name for path in sorted(run.glob("blocks/*/checkpoints/step-*"))}


def wait_for_training(run: Path, driver: subprocess.Popen[str]) -> list[int]:
    """Wait until some block has a checkpoint that was not there; returns the workers' process ids."""
    before, deadline = newest_steps(run), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert driver.poll() is None
        now = newest_steps(run)
        if any(step > before.get(block, "") for block, step in now.items()):
            return [line["pid"] for line in RunDirectory.open(run).events() if line["event"] == "block_running"]
        time.sleep(0.05)
    raise AssertionError("no training")


def is_worker(pid: int) -> bool:
    try:
        return "ray::BlockWorker" in Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(is_worker(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_saves_and_leaves_and_a_killed_driver_takes_its_workers_along(
    tmp_path: Path, config: RunConfig, home: Path, digest_of: DigestOf
) -> None:
    run = tmp_path / "run"
    driver = start(config, run, home)
    pids = wait_for_training(run, driver)
    os.killpg(driver.pid, signal.SIGINT)
    result = result_of(driver)
    assert {block["state"] for block in result["blocks"]} == {"stopped"}
    assert {block["restarts"] for block in result["blocks"]} == {0}
    wait_until_gone(pids)

    driver = start(config, run, home)
    pids = wait_for_training(run, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    wait_until_gone(pids)

    assert result_of(start(config, run, home))["ok"]
    attempts = [line["attempt"] for line in RunDirectory.open(run).events() if line["event"] == "block_running"]
    assert max(attempts) == 3
    assert train_run(config, tmp_path / "undisturbed", backend="inline").ok
    assert digest_of(run) == digest_of(tmp_path / "undisturbed")


def test_two_runs_at_once_do_not_disturb_each_other(
    tmp_path: Path, make_config: MakeConfig, home: Path, digest_of: DigestOf
) -> None:
    config = make_config(training={"steps": 300}, logging={"every": 25})
    drivers = [start(config, tmp_path / name, home) for name in ("a", "b")]
    results = [result_of(driver) for driver in drivers]
    assert all(result["ok"] for result in results)
    assert {block["restarts"] for result in results for block in result["blocks"]} == {0}
    journals = [RunDirectory.open(tmp_path / name).events() for name in ("a", "b")]
    began, ended = ([journal[place]["time"] for journal in journals] for place in (0, -1))
    assert max(began) < min(ended), "they were there at the same time"
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b")
