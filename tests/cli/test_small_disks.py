"""Disks that are full or read-only: one message, nothing half-written, and going on once there is room."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, finish, start, tree, unchanged
from small_disks import fill, resize, small_disk


def train(recipe: Path, run: Path) -> tuple[object, ...]:
    return ("train", recipe, "--run", run, "--backend", "inline")


def files(disk: Path) -> dict[str, str]:
    """Without folders: an empty one needs no room on a full disk, and misleads nobody."""
    return {name: content for name, content in tree(disk).items() if content != "folder"}


@pytest.mark.parametrize(("verb", "field"), [("train", "cannot write"), ("prepare", "--out")])
def test_a_read_only_disk(recipe: Path, tmp_path: Path, verb: str, field: str) -> None:
    with small_disk(tmp_path / "disk", "1M", read_only=True) as disk, unchanged(disk):
        line = train(recipe, disk / "run") if verb == "train" else ("prepare", "digits", "--out", disk / "data")
        assert_refused(dbtrain(*line), field, str(disk), "read-only", "choose another")


@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_a_full_disk(recipe: Path, tmp_path: Path, verb: str) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk)
        before = files(disk)
        line = train(recipe, disk / "run") if verb == "train" else ("prepare", "digits", "--out", disk / "data")
        result = dbtrain(*line)
        assert_refused(result, str(disk), "room" if verb == "prepare" else "free some space")
        assert files(disk) == before
        (disk / "filler").unlink()
        resize(disk, "4M")
        assert dbtrain(*line).code == 0


def test_a_disk_that_becomes_full_while_shards_are_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk, unchanged(disk):
        result = dbtrain("prepare", "digits", "--out", disk / "data")
        assert_refused(result, "--out", str(disk / "data"), "the disk is full", "make room")


@pytest.mark.parametrize("verb", ["assemble", "evaluate", "figures", "report"])
def test_results_on_a_full_disk(trained_runs: Path, tmp_path: Path, verb: str) -> None:
    with small_disk(tmp_path / "disk", "4M") as disk:
        shutil.copytree(trained_runs / "run", disk / "run")
        fill(disk)
        before = files(disk)
        result = dbtrain(verb, disk / "run")
        assert files(disk) == before
        assert_refused(result, str(disk / "run"), "No space left", "free some space")


def test_a_run_directory_that_became_read_only(recipe: Path, trained_runs: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "source", "4M") as disk:
        shutil.copytree(trained_runs / "run", disk / "run")
        for newest in disk.glob("run/blocks/*/checkpoints/step-00000020"):
            shutil.rmtree(newest)
        resize(disk, "4M,ro")
        with unchanged(disk):
            assert_refused(dbtrain(*train(recipe, disk / "run")), str(disk / "run"), "ead-only")
        resize(disk, "4M,rw")
        assert dbtrain(*train(recipe, disk / "run")).code == 0


@pytest.fixture
def waiting(recipe: Path, trained_runs: Path, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A disk with room for less than half of a run, and the command that has filled it and waits."""
    block = trained_runs / "run" / "blocks" / "00"
    pages = sum(-(-file.stat().st_size // 4096) + 1 for file in block.rglob("*") if file.is_file())
    with small_disk(tmp_path / "disk", f"{2 * 4 * pages}k") as disk:
        process = start(*train(recipe, disk / "run"))
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "waiting for room" in line:
                    break
            assert process.poll() is None
            assert re.match(rf"dbtrain: warning: cannot write {disk}.*: No space left on device; waiting for", line)
            assert "(free some space, or stop the run)" in line
            yield disk, process
        finally:
            process.kill()
            process.wait()


@pytest.mark.timeout(400)
def test_a_disk_that_becomes_full_in_mid_training(
    waiting: tuple[Path, subprocess.Popen[str]], trained_runs: Path
) -> None:
    disk, process = waiting
    assert checkpoints(disk, 0) == [10, 20]
    resize(disk, "8M")
    result = finish(process)
    assert (result.code, result.stdout) == (0, f"finished: {disk / 'run'}\n")
    assert "Traceback" not in result.stderr
    assert "failed" not in result.stderr
    assert not list(disk.rglob(".tmp-*"))
    digests = {dbtrain("assemble", run, "--json").json()["sha256"] for run in (disk / "run", trained_runs / "run")}
    assert len(digests) == 1


@pytest.mark.timeout(400)
def test_a_stop_ends_the_waiting_for_room(
    waiting: tuple[Path, subprocess.Popen[str]], recipe: Path, trained_runs: Path
) -> None:
    disk, process = waiting
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.code == 1
    assert "Traceback" not in result.stderr
    assert f"dbtrain: stopped; the same command goes on where it left: {disk / 'run'}" in result.stderr
    assert not list(disk.rglob(".tmp-*"))
    assert checkpoints(disk, 0) == [10, 20]
    assert_refused(dbtrain("assemble", disk / "run"), "block ")

    resize(disk, "8M")
    assert dbtrain(*train(recipe, disk / "run")).code == 0
    digests = {dbtrain("assemble", run, "--json").json()["sha256"] for run in (disk / "run", trained_runs / "run")}
    assert len(digests) == 1


def checkpoints(disk: Path, block: int) -> list[int]:
    return sorted(int(path.name[5:]) for path in disk.glob(f"run/blocks/{block:02d}/checkpoints/step-*"))
