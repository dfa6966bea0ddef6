"""Sweeps: what their files may say, which runs follow, what their table shows, and that a killed one goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep
import yaml
from local_cluster import wait_for
from small_families import raw_config
from sweep_file import ROOT, Job, RowJobs, expand, jobs_of, read_sweep
from sweep_runs import Failed, Measured, Outcome, RowOutcome, measure

from dbtrain.inference.evaluation import ACCURACY, BITS_PER_BYTE, Metric

SWEEPS = sorted((ROOT / "benchmarks" / "sweeps").glob("*.yaml"))
WriteSweep = Callable[..., Path]


@pytest.fixture
def write_sweep(tmp_path: Path, digits: Path) -> WriteSweep:
    """Writes a sweep over a small run on digits; keyword arguments replace its fields."""
    config = raw_config("vit", digits, training={"steps": 40}, checkpoints={"every": 10})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def write(**fields: Any) -> Path:
        raw = {"config": str(tmp_path / "run.yaml"), "seeds": [0, 1], "rows": [{"name": "blocks"}], **fields}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


TUNE = {"field": "optimiser.lr", "values": [0.001, 0.01], "seeds": [7]}


@pytest.mark.parametrize(
    ("fields", "more", "told"),
    [
        ({"seedz": [0]}, [], ["seedz: is not a known key"]),
        ({"rows": [{"name": "a", "sets": []}]}, [], ["rows.0.sets: is not a known key"]),
        ({"rows": []}, [], ["rows = []"]),
        ({"seeds": [0, 0]}, [], ["seeds = [0, 0]: 0 is there twice"]),
        ({"config": "configs/none.yaml"}, [], ["config = 'configs/none.yaml': no such configuration file"]),
        ({"rows": [{"name": "A b"}, {"name": "a-b"}]}, [], ["have to differ in letters and digits: 'a-b'"]),
        ({"rows": [{"name": "±"}]}, [], ["'±' needs a letter or a digit"]),
        ({"tune": TUNE}, ["--seeds", "7", "8"], ["seed 7 is tuned on and reported"]),
        ({}, ["--rows", "block"], ["--rows = 'block': is no row of the sweep (known: blocks)"]),
        ({"set": ["seed=3"]}, [], ["set = 'seed=3': is set by the sweep"]),
        ({"tune": TUNE}, ["--set", "optimiser.lr=1"], ["set = 'optimiser.lr=1': is set by the sweep"]),
        ({"tune": {**TUNE, "field": "optimiser.lrr"}}, [], ["did you mean 'lr'?"]),
        (
            {
                "rows": [
                    {"name": "deep", "set": ["model.dept=3"]},
                    {"name": "right"},
                    {"name": "cut", "kind": "end_to_end", "set": ["blocks.count=9"]},
                ]
            },
            [],
            ["row 'deep': model.dept: is not a known key", "row 'cut': ", "9"],
        ),
    ],
)
def test_mistakes_are_told_at_the_start(
    fields: dict[str, Any],
    more: list[str],
    told: list[str],
    write_sweep: WriteSweep,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = sweep.main([str(write_sweep(**fields)), "--runs", str(tmp_path / "runs"), *more])
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert not [text for text in told if text not in said.err], said.err
    assert all(line.startswith("sweep: ") for line in said.err.splitlines())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", [None, "rows: [", "- 1", "when: 2026-99-99"])
def test_a_file_that_is_no_sweep(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "sweep.yaml").write_text(text)
    assert sweep.main([str(tmp_path / "sweep.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.startswith("sweep: SWEEP = ")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_are_there_can_be_trained(path: Path, tmp_path: Path) -> None:
    file = read_sweep(path)
    rows = [jobs_of(file, row) for row in file.rows]
    if all(job.config.data.source == "digits" for row in rows for jobs in row.reported.values() for job in jobs):
        rows = expand(file, [f"data.path={tmp_path / 'digits'}"])
    folders = [job.folder for row in rows for jobs in row.reported.values() for job in jobs]
    assert len(set(folders)) == len(folders) > 1


def test_an_edited_sweep_never_meets_the_runs_of_the_old_one(write_sweep: WriteSweep) -> None:
    def folders(*overrides: str, **fields: Any) -> set[str]:
        rows = expand(read_sweep(write_sweep(**fields)), overrides)
        return {job.folder for row in rows for jobs in [row.tuning, *row.reported.values()] for job in jobs}

    before = folders(tune=TUNE)
    assert len(before) == 2 + 2 * 2
    assert before < folders(tune={**TUNE, "values": [0.001, 0.01, 0.1]})
    assert not before & folders(tune=TUNE, rows=[{"name": "blocks", "kind": "end_to_end"}])
    assert not before & folders("training.steps=39", tune=TUNE)


def test_set_comes_last(write_sweep: WriteSweep) -> None:
    path = write_sweep(set=["training.steps=10", "ema.half_life=1"], rows=[{"name": "a", "set": ["training.steps=20"]}])
    (row,) = expand(read_sweep(path), ["training.steps=30"])
    assert [job.config.training.steps for job in row.reported[None]] == [30, 30]
    assert {job.config.ema.half_life for job in row.reported[None]} == {1}


def measured(metric: Metric, value: float, **figures: float) -> Measured:
    return Measured(metric, "value", {"value": value, **figures}, 10, 20, 0.1)


def outcomes_of(rows: list[RowJobs], give: Callable[[Job], Outcome]) -> list[RowOutcome]:
    """What `run_all` gives, one run after the other in this process."""
    found = [RowOutcome(row) for row in rows]
    for row in found:
        row.outcomes |= {job.folder: give(job) for job in row.jobs.tuning}
        if row.jobs.tuning:
            row.choose()
        row.outcomes |= {job.folder: give(job) for job in row.reported}
    return found


@pytest.mark.parametrize(
    ("metric", "tried", "chosen"),
    [
        (ACCURACY, {"0.001": 0.2, "0.01": 0.3}, "0.01"),
        (BITS_PER_BYTE, {"0.001": 0.2, "0.01": 0.3}, "0.001"),
        (BITS_PER_BYTE, {"0.001": float("nan"), "0.01": 0.3}, "0.01"),
        (ACCURACY, {"0.001": 0.2, "0.01": None}, "0.001"),
        (ACCURACY, {"0.001": None, "0.01": None}, None),
    ],
)
def test_tuning_takes_the_best_value_that_gave_numbers(
    metric: Metric, tried: dict[str, float | None], chosen: str | None, write_sweep: WriteSweep
) -> None:
    def give(job: Job) -> Outcome:
        value = tried[str(job.value)]
        return Failed("lost", 0.1) if value is None else measured(metric, value)

    (row,) = outcomes_of(expand(read_sweep(write_sweep(tune=TUNE))), give)
    assert row.value == chosen
    lost = [f"{value}, seed 7: lost" for value, figure in tried.items() if figure is None]
    assert row.failures == (lost if chosen else [*lost, "no value was left to choose"])


def test_the_table_has_a_dash_where_there_is_nothing_and_the_reason_of_a_failure(write_sweep: WriteSweep) -> None:
    path = write_sweep(
        figures=["value", "extra"],
        tune=TUNE,
        rows=[{"name": "a"}, {"name": "b", "tune": False}, {"name": "c", "tune": False}],
    )

    def give(job: Job) -> Outcome:
        if job.row == "c":
            return Failed("it | broke\nhere", 0.1)
        if job.row == "b" and job.seed == 1:
            return Failed("lost", 0.1)
        return measured(ACCURACY, 0.5 + 0.1 * (job.seed % 7), **({"extra": 0.25} if job.row == "a" else {}))

    file = read_sweep(path)
    found = outcomes_of(expand(file), give)
    assert sweep.table(file, found).split("\n\n")[1].splitlines() == [
        "|  | value | extra | optimiser.lr | layer-evaluations | FLOPs | failed |",
        "|---|---|---|---|---|---|---|",
        "| a | 55.00 ± 7.07 | 25.00 ± 0.00 | 0.001 | 10 | 20 | – |",
        "| b | 50.00 | – | – | 10 | 20 | seed 1: lost |",
        "| c | – | – | – | – | – | seed 0: it \\| broke here; seed 1: it \\| broke here |",
    ]
    facts = json.loads(json.dumps(sweep.summary(file, found), allow_nan=False))
    assert facts["rows"][0]["tuned"]["value"] == 0.001
    assert facts["rows"][1]["figures"]["value"]["values"] == [0.5]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_killed_sweep_goes_on_and_ends_with_the_table_of_an_undisturbed_one(
    write_sweep: WriteSweep, tmp_path: Path
) -> None:
    path = write_sweep(
        tune=TUNE,
        rows=[
            {"name": "blocks"},
            {
                "name": "diverges",
                "kind": "end_to_end",
                "tune": False,
                "set": ["optimiser.lr=1.0e300", "training.max_rollbacks=0"],
            },
        ],
    )
    runs = tmp_path / "runs"
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), str(path), "--runs", str(runs), "--cpus", "2"]

    def evaluated() -> dict[Path, int]:
        return {found: found.stat().st_mtime_ns for found in runs.glob("*/evaluation.json")}

    def midway() -> bool:
        assert process.poll() is None, log.read_text()
        started = {found.parents[4] for found in runs.glob("*/blocks/*/checkpoints/step-*/MANIFEST")}
        return bool(evaluated() and started - {found.parent for found in evaluated()})

    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, process_group=0)
        try:
            wait_for(midway, "one run to be over and another one to be at work", 90)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    before = evaluated()
    assert not (runs / "sweep.json").exists()

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1, again.stderr  # one row diverges
    assert "Traceback" not in again.stderr
    assert "[6/6]" in again.stderr
    assert before.items() <= evaluated().items(), "runs that were over are only read"

    file = read_sweep(path)
    undisturbed = outcomes_of(expand(file), lambda job: measure(job, tmp_path / "undisturbed" / job.folder))
    assert again.stdout == sweep.table(file, undisturbed) + "\n"
    assert again.stdout.count("NonFiniteError") == 2
    facts = json.loads((runs / "sweep.json").read_text())
    assert facts["rows"] == sweep.summary(file, undisturbed)["rows"]
