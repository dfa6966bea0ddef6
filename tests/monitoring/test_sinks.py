"""Sinks that break: their own library is a fake that raises or hangs, everything else is real."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from local_cluster import wait_for
from small_runs import newest_files, start_run

from dbtrain.cli.main import run as cli
from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.monitoring.sinks import Sinks, check_sinks, send_assembly
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import Storage

SmallConfig = Callable[..., RunConfig]
FakeWandb = Callable[[str], Path]

RAISES = "raise RuntimeError('W&B is not at home')"
HANGS = "import time; time.sleep(600)"
SHORT = {"training": {"steps": 8}, "logging": {"every": 2}, "checkpoints": {"every": 4}, "chain": {"start_noises": 2}}


@pytest.fixture(scope="module")
def alone(small_config: SmallConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that nobody is told of."""
    where = tmp_path_factory.mktemp("alone") / "run"
    assert train_run(small_config(**SHORT), where).ok
    return RunDirectory.open(where)


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """Put a package in W&B's place whose `init` does something else; gives the file that tells that it was called."""

    def make(init: str) -> Path:
        package, called = tmp_path / "fakes" / "wandb", tmp_path / "called"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(
            f"def Settings(**named): ...\n\n\ndef init(**named):\n    open({str(called)!r}, 'w').close()\n    {init}\n"
        )
        monkeypatch.syspath_prepend(str(package.parent))
        path = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{path}" if path else str(package.parent))
        return called

    return make


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class HoldUntil:
    """Holds the driver up before its last block, until a file is there."""

    def __init__(self, file: Path):
        self.file = file

    def update(self, snapshot: Snapshot) -> None:
        if snapshot.blocks[1].state is BlockState.FINISHED:
            wait_for(self.file.exists, "the sink to be asked", 100)


def snapshot_of(run: RunDirectory) -> Snapshot:
    return Snapshot(run.uri, run.plan, (), 1, False)


@pytest.mark.parametrize(
    ("init", "patience", "report"),
    [
        (RAISES, 60.0, "W&B has failed and is left out from here on, training is not affected: RuntimeError: W&B is"),
        (HANGS, 0.5, "W&B has not taken everything within the 0.5 s of monitoring.patience and is given up; log: "),
    ],
)
def test_training_ends_as_if_there_were_none(
    alone: RunDirectory,
    small_config: SmallConfig,
    tmp_path: Path,
    fake_wandb: FakeWandb,
    caplog: pytest.LogCaptureFixture,
    init: str,
    patience: float,
    report: str,
) -> None:
    called = fake_wandb(init)
    told = small_config(**SHORT, monitoring={"wandb": "online", "patience": patience})
    assert train_run(told, tmp_path / "told", watch=HoldUntil(called)).ok
    assert [text[: len(report)] for text in warnings(caplog)] == [report]
    run = RunDirectory.open(tmp_path / "told")
    assert [line["event"] for line in run.events()] == [line["event"] for line in alone.events()]
    for index in range(3):
        assert newest_files(run, index) == newest_files(alone, index)
        steps, same = ([line["step"] for line in one.block(index).metrics()] for one in (run, alone))
        assert steps == same == [2, 4, 6, 8]
    caplog.clear()
    assert cli(["evaluate", str(tmp_path / "told"), "--json"]) == 0
    assert len(warnings(caplog)) == 1


def test_one_that_fails_early_is_reported_at_once_and_once(
    small_config: SmallConfig, tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    run = start_run(small_config(monitoring={"wandb": "offline"}), tmp_path / "run")
    run.block(0).log_metrics({"step": 1, "loss": 1.0})
    fake_wandb(RAISES)
    with Sinks(run) as sinks:

        def reported() -> bool:
            sinks.update(snapshot_of(run))
            return bool(caplog.records)

        wait_for(reported, "the report", 100)
        sinks.update(snapshot_of(run))
    assert len(warnings(caplog)) == 1
    assert str(tmp_path / "run/monitoring/wandb.log") in caplog.text


def test_an_interrupted_driver_does_not_wait(small_config: SmallConfig, tmp_path: Path, fake_wandb: FakeWandb) -> None:
    config = small_config(monitoring={"wandb": "offline", "patience": 1000.0})
    run = start_run(config, tmp_path / "run")
    run.block(0).log_metrics({"step": 1, "loss": 1.0})
    fake_wandb(HANGS)
    with pytest.raises(KeyboardInterrupt), Sinks(run) as sinks:
        raise KeyboardInterrupt
    [process] = sinks._running
    assert not process.ended
    process._process.kill()
    process._process.wait(60)


def test_somebody_who_has_enough_of_waiting_spoils_nothing(small_config: SmallConfig, tmp_path: Path) -> None:
    class Waiting:
        def finish(self) -> None: ...

        def wait(self, deadline: float, patience: float) -> None:
            signal.raise_signal(signal.SIGINT)

    with Sinks(start_run(small_config(), tmp_path / "run")) as sinks:
        sinks._running.append(Waiting())  # type: ignore[arg-type]


def test_a_process_whose_driver_is_gone_ends_by_itself(
    small_config: SmallConfig, tmp_path: Path, fake_wandb: FakeWandb
) -> None:
    run = start_run(small_config(monitoring={"wandb": "offline"}), tmp_path / "run")
    run.block(0).log_metrics({"step": 1, "loss": 1.0})
    fake_wandb(HANGS)
    command = [sys.executable, "-m", "dbtrain.monitoring.forward", "wandb", run.uri, "0.2"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (3, "not everything was sent within 0.2 s\n")


def test_a_folder_for_logs_that_cannot_be_made(
    small_config: SmallConfig, tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(RAISES)
    run = start_run(small_config(monitoring={"wandb": "offline"}), tmp_path / "run")
    (tmp_path / "run/monitoring").write_text("a file")
    with Sinks(run) as sinks:
        sinks.update(snapshot_of(run))
    assert len(warnings(caplog)) == 1
    assert "W&B is left out: " in caplog.text
    caplog.clear()
    send_assembly(run)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_said_before_anything_is_written(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here" / name / "logs").mkdir(parents=True)  # as W&B leaves behind where it was started
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])
    config = small_config(monitoring={name: "online" if name == "wandb" else True})
    with pytest.raises(UserError, match=f"{name} is not installed here .pip install 'dbtrain.{name}.'") as caught:
        train_run(config, tmp_path / "run")
    assert caught.value.field == f"monitoring.{name}"
    assert not (tmp_path / "run").exists()


def test_tensorboard_needs_a_local_run_directory(small_config: SmallConfig) -> None:
    pytest.importorskip("tensorboard")
    storage = Storage.open("s3://bucket/run?scheme=http&endpoint_override=127.0.0.1:1&region=x")
    with pytest.raises(UserError, match="need a run directory on this machine") as caught:
        check_sinks(small_config(monitoring={"tensorboard": True}), storage)
    assert caught.value.field == "monitoring.tensorboard"
    check_sinks(small_config(), storage)
