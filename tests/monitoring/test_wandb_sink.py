"""W&B itself, offline: what it wrote is read from its files."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from wandb_files import OfflineRun, offline_runs

from dbtrain.cli.main import run as cli
from dbtrain.config import RunConfig
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory

SmallConfig = Callable[..., RunConfig]
SHORT = {"training": {"steps": 12}, "logging": {"every": 2}, "checkpoints": {"every": 5}, "chain": {"start_noises": 2}}


class StopAt:
    """Stops the run in the middle of its second block, between two checkpoints."""

    def __init__(self, stop: StopToken):
        self.stop = stop

    def update(self, snapshot: Snapshot) -> None:
        if snapshot.blocks[1].step >= 7:
            self.stop.request()


@pytest.fixture(scope="module")
def no_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B knows nobody here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("WANDB_"):
                patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home / ("netrc" if name == "NETRC" else "")))
        yield


@pytest.fixture(scope="module")
def told(no_account: None, small_config: SmallConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that was stopped, gone on with, assembled and evaluated."""
    where = tmp_path_factory.mktemp("told") / "run"
    config = small_config(**SHORT, monitoring={"wandb": "offline", "wandb_project": "ours", "patience": 100.0})
    stop = StopToken()
    assert train_run(config, where, watch=StopAt(stop), stop=stop).stopped
    assert train_run(config, where).ok
    assert cli(["evaluate", str(where), "--json"]) == 0
    return RunDirectory.open(where)


@pytest.fixture(scope="module")
def runs(told: RunDirectory) -> list[OfflineRun]:
    return offline_runs(Path(told.uri))


def test_one_run_a_block_in_one_group_and_one_for_the_model(runs: list[OfflineRun]) -> None:
    # The second block was begun by one driver and ended by another.
    names = ["block-00", "block-01", "block-01", "block-02", "assembly"]
    assert [run.name for run in runs] == [f"small/{name}" for name in names]
    assert {(run.group, run.project) for run in runs} == {("small", "ours")}
    assert [run.job_type for run in runs] == ["block"] * 4 + ["assembly"]
    assert [run.id.split("-")[1] for run in runs] == ["00", "01", "01", "02", "assembly"]
    assert len({run.id.split("-")[0] for run in runs}) == 1
    assert [run.exit_code for run in runs] == [0] * 5


def test_each_step_is_told_once_and_is_what_the_block_wrote(told: RunDirectory, runs: list[OfflineRun]) -> None:
    for index in range(3):
        rows = [row for run in runs if run.name == f"small/block-{index:02d}" for row in run.history]
        steps = [row["_step"] for row in rows]
        assert steps == sorted(set(steps))
        assert {2, 4, 6, 8, 10, 12} <= set(steps)
        written = {line["step"]: line for line in reversed(told.block(index).metrics())}  # the first of each step
        for row in rows:
            line = written[row["_step"]]
            for name in ("loss", "grad_norm", "lr", "samples_per_second", "peak_memory", "attempt"):
                assert row[name] == line[name]
            assert row["_timestamp"] == line["time"]


def test_configuration_plan_and_how_each_block_ended(told: RunDirectory, runs: list[OfflineRun]) -> None:
    last = runs[3]
    assert last.config["training"] == told.config.model_dump(mode="json")["training"]
    assert last.config["run"] == told.uri
    assert last.config["block"]["index"] == 2
    assert last.config["block"]["parameters"] == told.plan.blocks[2].parameters
    assert last.summary["state"] == "finished"
    assert [run.summary["state"] for run in runs if run.name.endswith("01")] == ["stopped", "finished"]


def test_the_final_evaluation_and_the_model(told: RunDirectory, runs: list[OfflineRun]) -> None:
    kept = json.loads((Path(told.uri) / "evaluation.json").read_text())
    assembly = runs[-1]
    for name, value in kept["evaluation"]["readouts"].items():
        assert assembly.summary[f"evaluation/readouts/{name}"] == value
    assert assembly.summary["evaluation/chain/2/accuracy"] == kept["evaluation"]["chain"][2]["accuracy"]
    [(name, kind, files)] = assembly.artifacts
    assert (name, kind) == ("small-model", "model")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    copies = [path.read_bytes() for path in (Path(told.uri) / "wandb/data").rglob("*") if path.is_file()]
    assert (Path(told.uri) / "model/model.safetensors").read_bytes() in copies


@pytest.mark.slow
def test_no_process_that_trains_knows_wandb(told: RunDirectory, small_config: SmallConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(told.config.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from dbtrain.config import RunConfig;"
        "from dbtrain.orchestration.run import train_run;"
        "config = RunConfig.model_validate_json(Path('config.json').read_text());"
        "assert train_run(config, 'run').ok; assert not {'wandb', 'tensorboard'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=100)
    assert len(offline_runs(tmp_path / "run")) == 3


class Refusing(BaseHTTPRequestHandler):
    """A service of W&B's that knows no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    """Address of such a service."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def away() -> Iterator[str]:
    """Address where nobody answers."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{nobody.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("service", "key", "patience", "report"),
    [
        ("away", "", 60.0, "W&B has failed and is left out from here on.*No API key"),
        ("refusing", "0" * 40, 60.0, "W&B has failed and is left out from here on.*401"),
        ("away", "0" * 40, 5.0, "W&B has not taken everything within the 5 s of monitoring.patience"),
    ],
    ids=["no key", "wrong key", "service away"],
)
def test_mistakes_in_the_account_cost_a_report(
    no_account: None,
    small_config: SmallConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    service: str,
    key: str,
    patience: float,
    report: str,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", request.getfixturevalue(service))
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert train_run(small_config(**SHORT, monitoring={"wandb": "online", "patience": patience}), tmp_path).ok
    reports = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(reports) == 1
    assert re.match(report, reports[0])
