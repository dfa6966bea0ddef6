"""`status` and `monitor`, where there is no terminal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, finish, start, unchanged


def test_status_of_a_finished_run(trained_runs: Path) -> None:
    run = trained_runs / "run"
    with unchanged(run):
        result = dbtrain("status", run)
        told = dbtrain("status", run, "--json").json()
    assert (result.code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "small  finished"
    assert lines[3].endswith("100%, 3 blocks: 3 finished")
    rows = [line for line in lines if line[:1].isdigit()]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert all("20/20" in row for row in rows)

    assert (told["run"], told["name"], told["state"], told["starts"]) == (str(run), "small", "finished", 1)
    assert (told["fraction"], told["seconds_left"], told["troubles"]) == (1.0, 0.0, [])
    assert told["backend"] == "inline"
    block = told["blocks"][0]
    assert (block["index"], block["layers"], block["state"], block["step"], block["steps"]) == (
        *(0, [0, 2], "finished"),
        *(20, 20),
    )
    assert block["noise"]["high"] == 80.0
    assert block["loss"] > 0
    assert block["peak_memory"] > 0
    assert block["checkpoint_step"] == 20


def test_status_of_a_run_that_nobody_has_begun(trained_runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "plan.json"):
        shutil.copy(trained_runs / "run" / name, run)
    told = dbtrain("status", run, "--json").json()
    assert (told["state"], told["driver"], told["seconds_left"]) == ("new", None, None)
    assert told["blocks"][0]["loss"] is None  # JSON has no NaN
    assert "no driver has begun it" in dbtrain("status", run).stdout


def test_a_terminal_without_unicode(trained_runs: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained_runs / "run", place / "größer")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = finish(start("status", "größer"))
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1] == f"{place}/gr??er"
    assert "#" * 20 in result.stdout


def test_monitor_without_a_terminal_is_one_look(trained_runs: Path) -> None:
    result = dbtrain("monitor", trained_runs / "run")
    assert result.code == 0
    assert result.stderr.startswith("this is no terminal")
    assert result.stdout.splitlines()[0] == "small  finished"


@pytest.mark.parametrize("verb", ["status", "monitor"])
def test_what_is_no_run(verb: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        assert_refused(dbtrain(verb, path), "RUN", str(path), "is not a run directory", "dbtrain train")


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf", "1e9"])
def test_how_often_one_cannot_look(trained_runs: Path, every: str) -> None:
    assert_refused(dbtrain("monitor", trained_runs / "run", "--every", every), "--every", "0.1 to 3600 seconds")
