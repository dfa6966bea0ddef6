"""The demo as jobs on a Ray cluster of two nodes that wants a token, by the commands that a user gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import DBTRAIN, Result, assert_refused, overrides
from local_cluster import bare_cluster, free_port, wait_for
from run_journal import events

from dbtrain.assembly.assemble import assemble
from dbtrain.config_file import load_config
from dbtrain.orchestration.run import train_run
from dbtrain.run_directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEMO = Path(__file__).parents[2] / "configs/demo/vit.yaml"
PATIENCE = 150.0  # seconds


def test_submit_follow_stop_resume_assemble(tmp_path: Path, digits: Path) -> None:
    settings = ["model.depth=3", "model.width=16", "model.heads=2", "model.mlp_width=32", f"data.path={digits}"]
    settings += ["training.steps=600", "training.batch_size=16", "resources.cpus=0.5"]
    # Not what is trained: a run that is still at it when a stop arrives.
    slow = ["checkpoints.every=1", "resources.workers=1"]
    run, address = tmp_path / "run", f"http://127.0.0.1:{free_port()}"
    with bare_cluster() as cluster:
        cluster.start_head(cpus=1, dashboard=int(address.rpartition(":")[2]))
        cluster.add_node(cpus=1)

        def dbtrain(*arguments: object, **environment: str) -> Result:
            command = [str(DBTRAIN), *map(str, arguments), "--address", address]
            done = subprocess.run(
                command,
                env=cluster.environment() | environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            return Result(done.returncode, done.stdout, done.stderr)

        def tries() -> list[dict[str, Any]]:
            jobs: list[dict[str, Any]] = dbtrain("status", "vit-digits", "--json").json()["jobs"]
            return jobs

        assert_refused(dbtrain("status", RAY_AUTH_MODE="disabled"), "401", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH")
        (tmp_path / "token").write_text("f" * 64)
        assert_refused(dbtrain("status", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")), "403", "RAY_AUTH_TOKEN_PATH")

        submit = ("submit", DEMO, "--run", run, *overrides(*settings))
        first = dbtrain(*submit, *overrides(*slow), "--json").json()["submission_id"]
        wait_for(lambda: bool(events(run, "block_running")), "a worker", PATIENCE)
        assert [job["status"] for job in tries()] == ["RUNNING"]
        stopped = dbtrain("stop", "vit-digits", "--json").json()
        assert (stopped["submission_id"], stopped["graceful"]) == (first, True), stopped
        ended = dbtrain("status", "vit-digits", "--follow", "--json")
        assert (ended.code, ended.json()["status"]) == (1, "FAILED"), ended
        assert f"stopped; the same command goes on where it left: {run}" in ended.json()["message"]
        for line in events(run, "block_stopped"):
            saved = run / f"blocks/{line['block']:02d}/checkpoints/step-{line['step']:08d}"
            assert saved.is_dir() == (line["step"] > 0)

        # Another interpreter: this one, telling what it is asked to run.
        python, ran = tmp_path / "python", tmp_path / "ran"
        python.write_text(f'#!/bin/sh\necho "$@" >> {ran}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        followed = dbtrain(*submit, "--follow", "--python", python)
        assert followed.code == 0, followed
        assert f"finished: {run}" in followed.stdout
        assert "-m dbtrain train" in ran.read_text()
        assert "default_worker.py" in ran.read_text()
        other = dbtrain(*submit, "--set", "seed=5", "--follow", "--json")
        assert other.code == 2, other
        assert "holds another run; there -> here: seed: 0 -> 5" in other.json()["message"]
        assert [job["status"] for job in tries()] == ["FAILED", "SUCCEEDED", "FAILED"]

    assert len(events(run, "run_started")) == 2
    assert 0 < max(line["step"] for line in events(run, "block_stopped")) < 600
    undisturbed = tmp_path / "undisturbed"
    assert train_run(load_config(DEMO, settings), undisturbed, backend="inline").ok
    assert assemble(RunDirectory.open(run)).sha256 == assemble(RunDirectory.open(undisturbed)).sha256
