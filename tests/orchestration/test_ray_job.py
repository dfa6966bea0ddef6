"""A driver that Ray's job server started, and that it is told to stop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from local_cluster import bare_cluster, free_port, wait_for

from dbtrain.config import RunConfig
from dbtrain.orchestration.run import train_run
from dbtrain.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

PATIENCE = 150.0  # seconds


def test_a_job_that_is_stopped_has_saved_every_step(
    tmp_path: Path, make_config: Callable[..., RunConfig], digest_of: Callable[[Path], str]
) -> None:
    config = make_config(training={"steps": 2500}, checkpoints={"every": 60})
    recipe, run, port = tmp_path / "run.yaml", tmp_path / "run", free_port()
    recipe.write_text(config.to_yaml())
    with bare_cluster() as cluster:
        cluster.start_head(cpus=2, dashboard=port)

        def job(verb: str, *arguments: object) -> str:
            command = [
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "job",
                verb,
                "--address",
                f"http://127.0.0.1:{port}",
            ]
            environment = cluster.environment()
            done = subprocess.run(
                [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0 or verb == "stop", done.stderr + done.stdout
            return done.stdout

        train = [sys.executable, "-m", "dbtrain.cli.main", "train", recipe, "--run", run]
        job("submit", "--no-wait", "--submission-id", "train-1", "--", *train)
        wait_for(lambda: len(list(run.glob("blocks/*/checkpoints/step-*"))) >= 3, "checkpoints", PATIENCE)
        job("stop", "train-1")
        log = job("logs", "train-1")
    stopped = [line for line in RunDirectory.open(run).events() if line["event"] == "block_stopped"]
    finished = [line for line in RunDirectory.open(run).events() if line["event"] == "block_finished"]
    assert stopped, log
    assert sorted(line["block"] for line in stopped + finished) == [0, 1, 2], log
    assert f"dbtrain: stopped; the same command goes on where it left: {run}" in log
    for line in stopped:  # also between two checkpoints that were due
        assert (run / f"blocks/{line['block']:02d}/checkpoints/step-{line['step']:08d}").is_dir()
    assert train_run(config, run, backend="inline").ok
    assert train_run(config, tmp_path / "undisturbed", backend="inline").ok
    assert digest_of(run) == digest_of(tmp_path / "undisturbed")
