"""The installed command as a process: signals, deaths, and going on afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Result, assert_refused, dbtrain, finish, overrides, start, unchanged

from dbtrain.config import RunConfig
from dbtrain.data.shards import ShardSet

pytestmark = pytest.mark.timeout(400)

STEPS = 600
PATIENCE = 90  # seconds until a process has to have done what a test waits for


@pytest.fixture(scope="module")
def long_recipe(small_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that takes long enough to be disturbed."""
    config = small_config(training={"steps": STEPS}, checkpoints={"every": 20}, logging={"every": 10})
    path = tmp_path_factory.mktemp("long") / "long.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.fixture(scope="module")
def undisturbed(long_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the run that nobody disturbs."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert dbtrain("train", long_recipe, "--run", run, "--backend", "inline").code == 0
    return digest(run)


def digest(run: Path) -> str:
    sha256: str = dbtrain("assemble", run, "--json").json()["sha256"]
    return sha256


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints(run: Path, block: str = "*") -> list[Path]:
    return list(run.glob(f"blocks/{block}/checkpoints/step-*"))


def running(run: Path) -> dict[int, int]:
    """Process ids of the blocks that have been seen running, by block, newest last."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return {event["block"]: event["pid"] for event in events if event["event"] == "block_running"}


def arguments_of(pid: int) -> str:
    """What `ps` shows of a process; empty when there is none."""
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout


def assert_stopped(result: Result, run: Path) -> None:
    assert result.code == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == f"dbtrain: stopped; the same command goes on where it left: {run}"
    blocks = result.json()["blocks"]
    assert {block["state"] for block in blocks} <= {"stopped", "finished"}
    assert any(block["state"] == "stopped" for block in blocks)
    for block in blocks:
        saved = checkpoints(run, f"{block['index']:02d}")
        assert max((int(path.name[5:]) for path in saved), default=0) == block["step"]


def test_a_stopped_run_goes_on(long_recipe: Path, place: Path) -> None:
    short = ("train", long_recipe, *overrides("training.steps=120"), "--backend", "inline", "--json", "--run")
    process = start(*short, place / "run")
    wait_for(lambda: checkpoints(place / "run", "00"), process)
    process.send_signal(signal.SIGTERM)
    assert_stopped(finish(process), place / "run")
    for run in ("run", "undisturbed"):
        assert dbtrain(*short, place / run).code == 0
    assert digest(place / "run") == digest(place / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "number"),
    [("inline", signal.SIGINT), ("inline", signal.SIGUSR1), ("ray", signal.SIGINT), ("ray", signal.SIGTERM)],
)
def test_every_way_to_stop(
    long_recipe: Path, undisturbed: str, place: Path, backend: str, number: signal.Signals
) -> None:
    run = place / "run"
    line = ("train", long_recipe, "--run", run, "--backend", backend, "--json")
    process = start(*line)
    wait_for(lambda: checkpoints(run), process)
    # Ctrl-C on a terminal goes to all processes of the command, those of Ray included.
    (os.killpg if number is signal.SIGINT else os.kill)(process.pid, number)
    assert_stopped(finish(process), run)
    again = finish(start(*line))
    assert again.code == 0
    assert [block["step"] for block in again.json()["blocks"]] == [STEPS] * 3
    assert digest(run) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inline", "ray"])
def test_a_driver_that_is_killed(long_recipe: Path, undisturbed: str, place: Path, backend: str) -> None:
    run = place / "run"
    line = ("train", long_recipe, "--run", run, "--backend", backend, "--json")
    process = start(*line)
    wait_for(lambda: checkpoints(run), process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    again = finish(start(*line))
    assert (again.code, [block["state"] for block in again.json()["blocks"]]) == (0, ["finished"] * 3)
    assert digest(run) == undisturbed


@pytest.mark.slow
def test_a_worker_that_is_killed_from_outside(long_recipe: Path, undisturbed: str, place: Path) -> None:
    run = place / "run"
    process = start("train", long_recipe, "--run", run, "--backend", "ray", "--json")
    wait_for(lambda: checkpoints(run, "01") and 1 in running(run), process)
    worker = running(run)[1]
    assert arguments_of(worker).startswith("ray::BlockWorker")
    os.kill(worker, signal.SIGKILL)
    result = finish(process)
    assert result.code == 0
    blocks = result.json()["blocks"]
    assert [(block["state"], block["restarts"]) for block in blocks] == [
        ("finished", 0),
        ("finished", 1),
        ("finished", 0),
    ]
    assert "block 1: restarting" in result.stderr
    assert digest(run) == undisturbed


@pytest.mark.slow
def test_ending_another_verb_cleans_up(place: Path) -> None:
    process = start("prepare", "digits", "--out", place / "data")
    wait_for(lambda: list(place.glob(".data.partial-*")) or (place / "data").exists(), process)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    if (place / "data").exists():  # the signal came when it was done, perhaps while Python was already shutting down
        assert ShardSet.open(place / "data", "train").rows > 0
    else:
        assert result.code == 1
    assert "Traceback" not in result.stderr
    assert not list(place.glob(".data.*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_python_shuts_down_prints_nothing(number: signal.Signals) -> None:
    at_exit = f"import atexit, os; atexit.register(lambda: os.kill(os.getpid(), {number.value}))"
    command = f"{at_exit}; import sys; sys.argv = ['dbtrain', '--version']; from dbtrain.cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.stdout.startswith("dbtrain ")


RAY = {
    "more GPUs than exist": (["resources.gpus=8"], [], "resources.gpus = 8.0", "asks for 8 GPUs a worker", "has"),
    "more CPUs than a node has": (["resources.cpus=5000"], [], "resources.cpus = 5000.0", "asks for 5000 CPUs", "set"),
    "a GPU that is not reserved": (["resources.device=cuda"], [], "resources.device = 'cuda'", "resources.gpus is 0"),
    "nobody at the address": ([], ["--address", "127.0.0.1:1"], "--address = '127.0.0.1:1'", "nobody answers"),
    "not an address": ([], ["--address", "nonsense"], "--address = 'nonsense'", "cannot join", "nonsense"),
    "an address of Ray Client": ([], ["--address", "ray://a:1"], "--address = 'ray://a:1'", "host:port"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RAY)
def test_what_a_cluster_cannot_give(long_recipe: Path, place: Path, case: str) -> None:
    settings, options, *expected = RAY[case]
    assert isinstance(settings, list)
    with unchanged(place):
        line = ("train", long_recipe, "--run", place / "run", *options, *overrides(*settings))
        result = finish(start(*line))
    assert_refused(result, *map(str, expected))
