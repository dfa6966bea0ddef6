from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import start_run, train_all, train_block

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.monitoring.run_view import RunReader
from dbtrain.monitoring.web.draw import draw
from dbtrain.monitoring.web.samples import Studio
from dbtrain.run_directory import RunDirectory

FamilyConfig = Callable[..., RunConfig]
SHORT = {"training": {"steps": 4}, "checkpoints": {"every": 2}, "logging": {"every": 1}}


def _told(studio: Studio, reader: RunReader, wanted: str) -> dict[str, Any]:
    """What is told once its status is `wanted`."""
    deadline = time.monotonic() + 90
    while True:
        told = studio.look(reader.read())
        if told["status"] == wanted:
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


@pytest.mark.parametrize("family", ["vit", "dit", "causal_lm", "masked_lm"])
def test_what_there_is_to_show_of_a_family(family_config: FamilyConfig, tmp_path: Path, family: str) -> None:
    run = train_all(start_run(family_config(family, **SHORT), tmp_path / "run"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    folder = tmp_path / "folder"
    folder.mkdir()
    answer = draw(run, folder)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files
    assert (answer["steps"], answer["weights"]) == ([4, 4, 4], "ema")
    assert (folder / "samples.png").exists() == (family == "dit")
    assert ("about" in answer) == (family == "vit")
    prompts = {"causal_lm": ["The "] * 3, "masked_lm": [""] * 3}.get(family, [])
    assert [prompt for prompt, _ in answer.get("texts", [])] == prompts
    json.dumps(answer)


def test_blocks_without_a_checkpoint_are_not_drawn(family_config: FamilyConfig, tmp_path: Path) -> None:
    run = start_run(family_config("dit", **SHORT), tmp_path / "run")
    train_block(run, 0)
    with pytest.raises(UserError):
        draw(run, tmp_path)


def test_a_disk_without_room_is_told_and_the_studio_goes_on(
    family_config: FamilyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(family_config("dit", **SHORT), tmp_path / "run")
    _journal(run, 4)
    reader = RunReader(run)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    studio = Studio(run, every=0.01)
    try:
        assert "gone" in _told(studio, reader, "failed")["problem"]
        _journal(run, 5)
        deadline = time.monotonic() + 60
        while studio._drawn != (5, 5, 5):
            _told(studio, reader, "failed")
            assert time.monotonic() < deadline
    finally:
        studio.close()


@pytest.mark.slow
def test_a_studio_draws_fails_and_draws_again(family_config: FamilyConfig, tmp_path: Path) -> None:
    run = train_all(start_run(family_config("dit", **SHORT), tmp_path / "run"))
    _journal(run, 4)
    reader = RunReader(run)
    damaged = next((tmp_path / "run/blocks/01/checkpoints").glob("*4/ema*"))
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-1] + b"x")
    studio = Studio(run, every=0.01)
    try:
        assert studio.look(RunReader(run).view)["status"] == "waiting"  # nothing of the run has been read
        told = _told(studio, reader, "failed")
        assert "ema" in told["problem"]
        assert not told["picture"]
        damaged.write_bytes(good)
        _journal(run, 5)
        told = _told(studio, reader, "drawn")
        assert (told["steps"], told["picture"], told["version"]) == ([4, 4, 4], True, 1)
        assert studio.png is not None
        assert "problem" not in told
        _journal(run, 6)
        assert _told(studio, reader, "drawing")["steps"] == [4, 4, 4]  # those that are shown
        deadline = time.monotonic() + 60
        while studio._child is None or studio._child.poll() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        studio.close()
    assert studio._child.poll() is not None


def _journal(run: RunDirectory, step: int) -> None:
    for block in range(3):
        told = {"step": step, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "samples_per_second": 1.0, "attempt": 1}
        run.block(block).log_metrics(told | {"checkpoint_step": step})
