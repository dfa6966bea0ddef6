"""Blocks of several workers on Ray: scaled in mid-run, and losing one of their workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from local_cluster import wait_for
from run_journal import events

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.orchestration.run import train_run
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import read_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MakeConfig = Callable[..., RunConfig]
PATIENCE = 180.0  # seconds
DBTRAIN = Path(sys.executable).with_name("dbtrain")


def start(config: RunConfig, run: Path) -> subprocess.Popen[str]:
    recipe = run.with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    command = [DBTRAIN, "train", recipe, "--run", run, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def attempts_that_trained(run: Path, block: int) -> set[int]:
    path = run / f"blocks/{block:02d}/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {json.loads(line)["attempt"] for line in lines if line.endswith("\n")}


def workers_of(run: Path, block: int, attempt: int) -> list[int]:
    """Process ids of a block's workers, from what each wrote into its log first."""
    folder = events(run, "run_started")[-1]["worker_logs"]
    told = f"dbtrain run {run} block {block} attempt {attempt} "
    logs = [path.read_text(errors="replace") for path in Path(folder).glob("worker-*.out")]
    return sorted(int(line.split()[-1]) for log in logs for line in log.splitlines() if line.startswith(told))


@pytest.mark.long
def test_a_block_of_a_live_run_is_scaled_up_and_down_and_loses_a_worker(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    config = make_config(
        training={"steps": 3000}, checkpoints={"every": 100}, logging={"every": 1}, resources={"cpus": 0.25}
    )
    run = tmp_path / "run"
    driver = start(config, run)
    try:
        wait_for(lambda: attempts_that_trained(run, 1) == {1}, "block 1 to train", PATIENCE)
        subprocess.run([DBTRAIN, "scale", run, "block=1", "replicas=2"], check=True, timeout=PATIENCE)
        wait_for(lambda: 2 in attempts_that_trained(run, 1), "two workers to train", PATIENCE)
        workers = workers_of(run, 1, attempt=2)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)  # not the one that writes
        wait_for(lambda: 3 in attempts_that_trained(run, 1), "two new workers to train", PATIENCE)
        subprocess.run([DBTRAIN, "scale", run, "block=1", "replicas=1"], check=True, timeout=PATIENCE)
        wait_for(lambda: 4 in attempts_that_trained(run, 1), "one worker to train", PATIENCE)
        out, err = driver.communicate(timeout=PATIENCE)
    finally:
        driver.kill()
    assert driver.returncode == 0, err
    blocks = json.loads(out)["blocks"]
    assert [block["state"] for block in blocks] == ["finished"] * 3
    # Making room for another worker is no restart, losing one is.
    assert [block["restarts"] for block in blocks] == [0, 1, 0]
    starts = [line for line in events(run, "block_starting") if line["block"] == 1]
    assert [line["replicas"] for line in starts] == [1, 2, 2, 1]
    assert [line["attempt"] for line in events(run, "block_starting") if line["block"] != 1] == [1, 1]

    assert train_run(config, tmp_path / "undisturbed", backend="inline").ok
    ours, theirs = RunDirectory.open(run), RunDirectory.open(tmp_path / "undisturbed")
    for block in (0, 2):  # to the byte
        left, right = (read_weights(directory.block(block), "raw")[1] for directory in (ours, theirs))
        assert all(left[name].equal(right[name]) for name in right)
    losses = [{line["step"]: line["loss"] for line in directory.block(1).metrics()} for directory in (ours, theirs)]
    early = range(1, 301)  # small differences grow: what is equal is the function, not every bit
    assert [losses[0][step] for step in early] == pytest.approx([losses[1][step] for step in early], rel=1e-3)


def test_more_workers_than_fit_are_refused_with_the_numbers(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(resources={"cpus": 1.0, "replicas": 16})
    with pytest.raises(
        UserError, match=r"asks for 16 workers a block, and \d+ fits? on the cluster's 1 node"
    ) as caught:
        train_run(config, tmp_path / "run", backend="ray")
    assert caught.value.field == "resources.replicas"
    assert not (tmp_path / "run").exists()
