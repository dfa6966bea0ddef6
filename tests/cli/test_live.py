"""Asking a live run for something, from another process."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, finish, start, unchanged
from run_journal import events

from dbtrain.config import RunConfig

pytestmark = pytest.mark.timeout(300)

PATIENCE = 90.0  # seconds


@pytest.fixture(scope="module")
def endless(small_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody sees the end of."""
    config = small_config(training={"steps": 1_000_000}, checkpoints={"every": 1000})
    path = tmp_path_factory.mktemp("endless") / "endless.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.fixture
def live(endless: Path, place: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """The directory of a run that trains in this machine's other processes, one block after the other."""
    run = place / "run"
    process = start("train", endless, "--run", run, "--backend", "inline", "--json")
    deadline = time.monotonic() + PATIENCE
    while not events(run, "block_running"):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield run, process
    process.kill()
    process.wait()


def test_stop(live: tuple[Path, subprocess.Popen[str]]) -> None:
    run, process = live
    assert dbtrain("stop", run, "--json").json() == {"run": str(run), "stopping": True}
    result = finish(process)
    assert result.code == 1
    assert [block["state"] for block in result.json()["blocks"]] == ["stopped"] * 3
    # What has been done is saved, to the step.
    assert result.json()["blocks"][0]["step"] > 0
    saved = max(path.name for path in run.glob("blocks/00/checkpoints/step-*"))
    assert int(saved[5:]) == result.json()["blocks"][0]["step"]
    assert not list(run.glob("requests/*"))
    assert_refused(dbtrain("stop", run), str(run), "nobody is training this run", "dbtrain train")


def test_what_cannot_be_scaled(live: tuple[Path, subprocess.Popen[str]]) -> None:
    run, process = live
    assert_refused(dbtrain("scale", run, "block=7", "replicas=2"), "there is no block 7", "blocks 0 to 2")
    assert_refused(dbtrain("scale", run, "replicas=0"), "at least 1 worker")
    assert_refused(dbtrain("scale", run, "replicas=3"), "3 workers cannot share batches of 16 samples")
    assert_refused(dbtrain("scale", run, "block=0", "replicas=2"), "needs 1 more worker, and there is room for 0 of 1")
    assert process.poll() is None
    refused = events(run, "request_answered")
    assert [line["done"] for line in refused] == [False] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["block=1"], "does not say how many workers"),
        (["replicas=two"], "is not one of block=N and replicas=M"),
        (["replicas=2", "replicas=3"], "each once"),
        (["workers=2"], "is not one of"),
    ],
)
def test_words_that_scale_does_not_know(trained_runs: Path, settings: list[str], message: str) -> None:
    with unchanged(trained_runs):
        assert_refused(dbtrain("scale", trained_runs / "run", *settings), message)


@pytest.mark.parametrize("verb", [("stop",), ("scale", "replicas=1")])
def test_a_run_that_is_over_and_a_folder_that_is_none(
    trained_runs: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    name, *rest = verb
    with unchanged(trained_runs):
        assert_refused(dbtrain(name, trained_runs / "run", *rest), "nobody is training this run")
    assert_refused(dbtrain(name, tmp_path, *rest), "is not a run directory")
