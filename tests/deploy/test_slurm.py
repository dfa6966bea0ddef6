"""`launch/slurm.sbatch`, run for real but for Slurm: `srun` and `scontrol` are scripts that stay on this machine."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deployment import ROOT, TOOLS, processes_with, text

from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import checkpoint_steps

SCRIPT = "launch/slurm.sbatch"
PATIENCE = 120.0  # seconds

SRUN = """#!/usr/bin/env bash
tasks=1
while [[ $1 == --* ]]; do
  case $1 in
    --ntasks=*) tasks=${1#*=} ;;
    --nodes=* | --ntasks-per-node=1 | --nodelist=* | --cpus-per-task=*) ;;
    *) echo "srun: unrecognized option '$1'" >&2 && exit 1 ;;
  esac
  shift
done
for ((task = 0; task < tasks; task++)); do
  "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
wait
wait
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  'show hostnames') printf 'node%s\\n' 1 2 ;;
  *) echo "$*" >>"$SCONTROL_LOG" ;;
esac
"""


class Job:
    """A batch job of Slurm's, of which each start is a process of this machine."""

    def __init__(self, folder: Path, *arguments: object):
        self.arguments = [str(argument) for argument in arguments]
        self.log = folder / "scontrol.log"
        self.output = folder / "job.out"
        self.home = folder / "home"
        self.home.mkdir()
        bin_ = folder / "bin"
        bin_.mkdir()
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin_ / name).write_text(script)
            (bin_ / name).chmod(0o755)
        self.id = _job_id()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
        self.environment = kept | {
            "PATH": f"{bin_}:{kept['PATH']}",
            "HOME": str(self.home),
            "DBTRAIN_VENV": str(TOOLS.parent),
            "OMP_NUM_THREADS": "1",
            "SCONTROL_LOG": str(self.log),
            "SLURM_JOB_ID": str(self.id),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }

    def start(self) -> subprocess.Popen[bytes]:
        """What Slurm does on the first node."""
        with self.output.open("ab") as output:
            command = ["bash", str(ROOT / SCRIPT), *self.arguments]
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment
            )

    def requeued(self) -> list[str]:
        """What `scontrol` was asked for, other than names of nodes."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def left(self) -> dict[int, str]:
        """Processes that the job has left behind."""
        return processes_with(f"SLURM_JOB_ID={self.id}")

    def wait_for(self, happened: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def wait_until_gone(self) -> None:
        """Ray's workers notice within seconds that their node has ended."""
        deadline = time.monotonic() + PATIENCE
        while left := self.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def _job_id() -> int:
    """One whose port is free."""
    while True:
        number = 10_000 * (1 + secrets.randbelow(900)) + secrets.randbelow(10_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", 20_000 + number % 10_000))
            except OSError:
                continue
        return number


@pytest.fixture
def job(tmp_path: Path, small_config: Callable[..., RunConfig]) -> Iterator[Job]:
    """A job that trains two small blocks in `run`."""
    config = small_config(model={"depth": 2}, blocks={"count": 2}, training={"steps": 1000}, checkpoints={"every": 500})
    path = tmp_path / "small.yaml"
    path.write_text(config.to_yaml())
    job = Job(tmp_path, path, tmp_path / "run", "--order", "1,0")
    yield job
    for pid in job.left():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_stopped_in_time_and_finished_after_the_requeue(job: Job, tmp_path: Path) -> None:
    process = job.start()
    # A block that trains, not one that is being built: there is something to save.
    job.wait_for(lambda: any(log.stat().st_size for log in tmp_path.glob("run/blocks/*/metrics.jsonl")), process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 1, job.output.read_text()
    assert "2 of 2 nodes are there" in job.output.read_text()
    assert job.requeued() == [f"requeue {job.id}"]
    job.wait_until_gone()
    run = RunDirectory.open(tmp_path / "run")
    before = [max(checkpoint_steps(run.block(block.index)), default=0) for block in run.plan.blocks]
    assert 0 < max(before) < 1000

    assert job.start().wait(2 * PATIENCE) == 0, job.output.read_text()
    assert [max(checkpoint_steps(run.block(block.index))) for block in run.plan.blocks] == [1000] * 2
    assert job.requeued() == [f"requeue {job.id}"]
    job.wait_until_gone()
    assert not list((job.home / ".dbtrain").iterdir())
    assert not Path(f"/tmp/ray-{job.id}").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ended_by_its_owner_it_stays_ended(job: Job, tmp_path: Path) -> None:
    process = job.start()
    job.wait_for(lambda: job.output.exists() and "slurm.sbatch: head " in job.output.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 1, job.output.read_text()
    assert job.requeued() == []
    assert not (tmp_path / "run").exists()
    job.wait_until_gone()
    assert not list((job.home / ".dbtrain").iterdir())


def test_a_job_without_arguments() -> None:
    done = subprocess.run(["bash", ROOT / SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "slurm.sbatch: give CONFIG and RUN\n")


def test_what_slurm_is_asked_for() -> None:
    head = text(SCRIPT).partition("set -euo pipefail")[0]
    asked = dict(re.findall(r"(?m)^#SBATCH --([a-z-]+)(?:=(\S+))?$", head))
    assert len(asked) == head.count("#SBATCH")
    # To the shell alone, which tells the driver; to the steps it would be the end of Ray's nodes.
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"])
    assert {"nodes", "time", "gpus-per-node", "cpus-per-task", "requeue"} <= asked.keys()
    # A start goes on in the output of the one before, and every node has one task: `ray start`.
    assert (asked["open-mode"], asked["ntasks-per-node"]) == ("append", "1")
