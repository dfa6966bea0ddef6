"""Disks that are full or read-only: one message, nothing half-written, and going on once there is room."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, tree, unchanged
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


@pytest.mark.parametrize("verb", ["assemble", "evaluate", "figures"])
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


def test_a_disk_that_becomes_full_in_mid_training(recipe: Path, trained_runs: Path, tmp_path: Path) -> None:
    block = trained_runs / "run" / "blocks" / "00"
    pages = sum(-(-file.stat().st_size // 4096) + 1 for file in block.rglob("*") if file.is_file())
    with small_disk(tmp_path / "disk", f"{2 * 4 * pages}k") as disk:
        result = dbtrain(*train(recipe, disk / "run"))
        assert result.code == 1
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        last = result.stderr.splitlines()[-1]
        assert re.match(r"dbtrain: block [12] failed at step \d+: cannot write ", last)
        assert "No space left on device (free some space" in last
        assert "the same command" in last
        assert not list(disk.rglob(".tmp-*"))
        assert sorted(path.name for path in disk.glob("run/blocks/00/checkpoints/*")) == [
            "step-00000010",
            "step-00000020",
        ]
        assert_refused(dbtrain("assemble", disk / "run"), "block ")

        resize(disk, "8M")
        assert dbtrain(*train(recipe, disk / "run")).code == 0
        digests = {dbtrain("assemble", run, "--json").json()["sha256"] for run in (disk / "run", trained_runs / "run")}
        assert len(digests) == 1
