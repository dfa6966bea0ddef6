"""Nodes that join and leave while a run trains, each a raylet of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_cluster import LocalCluster, bare_cluster, local_cluster, wait_for
from run_journal import events

from dbtrain.config import RunConfig
from dbtrain.orchestration.run import train_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MakeConfig = Callable[..., RunConfig]
DigestOf = Callable[[Path], str]
PATIENCE = 150.0  # seconds
DBTRAIN = Path(sys.executable).with_name("dbtrain")


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """A head with room for one worker."""
    with local_cluster(nodes=1, cpus=1) as here:
        yield here


def start(cluster: LocalCluster, config: RunConfig, run: Path) -> subprocess.Popen[str]:
    recipe = run.with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    return subprocess.Popen(
        [DBTRAIN, "train", recipe, "--run", run, "--address", cluster.address, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cluster.environment(),
    )


@pytest.mark.long
def test_nodes_join_and_leave_in_mid_run(
    cluster: LocalCluster, tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf
) -> None:
    run = tmp_path / "run"
    config = make_config(training={"steps": 3000}, checkpoints={"every": 50}, resources={"cpus": 1})
    driver = start(cluster, config, run)
    try:
        wait_for(lambda: bool(events(run, "block_running")), "the first block to train", PATIENCE)
        assert [line["block"] for line in events(run, "block_starting")] == [0]
        node = cluster.add_node(cpus=2)
        wait_for(lambda: len(events(run, "block_running")) == 3, "all blocks to train", PATIENCE)
        assert sorted(events(run, "nodes_changed")[-1]["nodes"].values()) == [1, 2]
        saved = [run / f"blocks/{block:02d}/checkpoints/step-00000100" for block in (1, 2)]
        wait_for(lambda: all(path.exists() for path in saved), "the new node's blocks to save", PATIENCE)
        node.kill_raylet()
        out, err = driver.communicate(timeout=PATIENCE)
    finally:
        driver.kill()
    assert driver.returncode == 0, err
    assert len(out.splitlines()) == 1, "standard output holds the result alone"
    blocks = json.loads(out)["blocks"]
    assert [block["state"] for block in blocks] == ["finished"] * 3
    assert blocks[0]["restarts"] == 0
    assert all(block["restarts"] >= 1 for block in blocks[1:])
    assert list(events(run, "nodes_changed")[-1]["nodes"].values()) == [1]
    assert train_run(config, tmp_path / "undisturbed", backend="inline").ok
    assert digest_of(run) == digest_of(tmp_path / "undisturbed")


def test_a_node_without_memory_is_told_with_what_helps(tmp_path: Path, make_config: MakeConfig) -> None:
    with bare_cluster() as cluster:
        # More than this is always in use.
        cluster.start_head(extra={"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"})
        config = make_config(resources={"cpus": 1, "max_restarts": 0}, blocks={"count": 1})
        driver = start(cluster, config, tmp_path / "run")
        out, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 1, err
    reason = json.loads(out)["blocks"][0]["reason"]
    assert reason.startswith("Ray ended the worker's process, as its node ran low on memory; block 0 ran out of memory")
    assert "training.accumulate=2" in reason
    assert len(err.splitlines()[-1]) < 1000
