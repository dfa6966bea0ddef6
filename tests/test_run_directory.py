from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config, parse_config
from dbtrain.errors import CorruptData, UserError
from dbtrain.plan import BlockPlan, Bytes, DatasetFacts, Kind, NoiseRange, Plan
from dbtrain.run_directory import RunDirectory, StaleAttempt
from dbtrain.storage import Storage


def make_config(**changes: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "name": "small",
        "model": {"image_size": 8, "channels": 1, "num_classes": 10, "patch_size": 4, "depth": 2}
        | {"width": 8, "heads": 2, "mlp_width": 16},
        "blocks": {"count": 2},
        "training": {"steps": 10, "batch_size": 4},
    }
    return parse_config(raw | changes)


def make_plan(config: RunConfig, kind: Kind = "blocks", data: str = "a" * 64) -> Plan:
    noise = NoiseRange(low=0.1, high=1.0)
    cost = Bytes(parameters=4, buffers=0, gradients=4, optimiser=8, ema=0, activations=0)
    return Plan(
        kind=kind,
        name=config.name,
        config_sha256=config.digest(),
        codebook_sha256=None,
        seed=config.seed,
        steps=config.training.steps,
        batch_size=config.training.batch_size,
        threads=1,
        data=DatasetFacts(
            sha256=data,
            kind="image",
            shape=(1, 8, 8),
            train_rows=8,
            test_rows=4,
            class_names=("a", "b"),
            mean=(0.5,),
            std=(0.5,),
            vocab_size=None,
            separator=None,
            tokenizer_sha256=None,
        ),
        blocks=tuple(
            BlockPlan(
                index=index,
                layers=(index, index + 1),
                noise=noise,
                trained=noise,
                parameters=1,
                bytes=cost,
                evaluations=1,
                flops_per_sample=1,
            )
            for index in range(2)
        ),
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = make_config()
    return RunDirectory.create_or_resume(tmp_path / "run", config, make_plan(config))


def test_new_run_is_written_and_read_back(run: RunDirectory, tmp_path: Path) -> None:
    again = RunDirectory.open(run.uri)
    assert again.config == run.config
    assert again.plan == run.plan
    assert load_config(tmp_path / "run" / "config.yaml") == run.config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "plan.json"]


def test_resuming_takes_the_new_cadence_and_keeps_the_plan(run: RunDirectory) -> None:
    config = make_config(checkpoints={"every": 3}, name="renamed")
    again = RunDirectory.create_or_resume(run.uri, config, make_plan(config))
    assert again.config.checkpoints.every == 3
    assert again.plan == run.plan
    assert RunDirectory.open(run.uri).config == config


def test_start_that_died_before_the_plan_is_repeated(run: RunDirectory) -> None:
    run.storage.remove_tree("plan.json")
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.open(run.uri)
    config = make_config(seed=5)
    assert RunDirectory.create_or_resume(run.uri, config, make_plan(config)).config.seed == 5


def test_another_configuration_is_refused_with_the_difference(run: RunDirectory, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    config = make_config(seed=7, optimiser={"lr": 0.5})
    with pytest.raises(UserError) as caught:
        RunDirectory.create_or_resume(run.uri, config, make_plan(config))
    assert caught.value.field == "--run"
    assert "seed: 0 -> 7" in str(caught.value)
    assert "optimiser.lr: 0.001 -> 0.5" in str(caught.value)
    assert "width" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_another_kind_or_other_data_is_refused(run: RunDirectory) -> None:
    with pytest.raises(UserError, match=r"plan\.kind: 'blocks' -> 'end_to_end'"):
        RunDirectory.create_or_resume(run.uri, run.config, make_plan(run.config, kind="end_to_end"))
    with pytest.raises(UserError, match=r"plan\.data\.sha256: 'a+' -> 'b+'"):
        RunDirectory.create_or_resume(run.uri, run.config, make_plan(run.config, data="b" * 64))


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for where in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UserError, match="not a run directory"):
            RunDirectory.open(where)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", "{"),
        ("plan.json", "{}"),
        ("config.yaml", "{a: ["),
        ("config.yaml", "text"),
        ("config.yaml", "\x00"),
    ],
)
def test_open_names_the_damaged_file(run: RunDirectory, name: str, content: str) -> None:
    run.storage.write_atomic(name, content.encode())
    with pytest.raises(CorruptData, match=name):
        RunDirectory.open(run.uri)


def test_journal_skips_torn_lines(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    assert run.events() == []
    run.journal({"event": "started", "block": 0})
    path = run.storage.local_path
    assert path is not None
    with (path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "sta')
    with caplog.at_level(logging.WARNING):
        assert [event["event"] for event in run.events()] == ["started"]
    assert "line 2" in caplog.text
    run.journal({"event": "ended"})
    assert [event["event"] for event in run.events()] == ["started", "ended"]
    assert all(isinstance(event["time"], float) for event in run.events())


def test_attempts_only_go_forward(run: RunDirectory) -> None:
    block = run.block(1)
    assert block.current_attempt() == 0
    block.claim(1)
    block.claim(3)
    block.claim(3)
    with pytest.raises(StaleAttempt, match="attempt 3"):
        block.claim(2)
    assert run.block(1).current_attempt() == 3
    assert run.block(0).current_attempt() == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"attempt": "3"}', '{"attempt": true}'])
def test_damaged_attempt_file_is_not_taken_for_none(run: RunDirectory, content: str) -> None:
    run.block(0).storage.write_atomic("attempt.json", content.encode())
    with pytest.raises(CorruptData, match=r"attempt\.json"):
        run.block(0).current_attempt()


def test_metrics_of_a_block(run: RunDirectory) -> None:
    assert run.block(1).metrics() == []
    run.block(1).log_metrics({"step": 5, "loss": 0.25})
    [line] = run.block(1).metrics()
    assert line["step"] == 5
    assert line["loss"] == 0.25
    assert json.loads(run.storage.read_text("blocks/01/metrics.jsonl")) == line
    with pytest.raises(IndexError):
        run.block(2)


def test_run_on_an_object_store() -> None:
    storage = Storage.open("mock:///runs/a")
    config = make_config()
    run = RunDirectory.create_or_resume(storage, config, make_plan(config))
    run.block(0).claim(2)
    run.journal({"event": "started"})
    run.journal({"event": "ended"})
    again = RunDirectory.create_or_resume(storage, config, make_plan(config))
    assert again.block(0).current_attempt() == 2
    assert [event["event"] for event in again.events()] == ["started", "ended"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    config = make_config()
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        RunDirectory.create_or_resume(tmp_path / "file", config, make_plan(config))
