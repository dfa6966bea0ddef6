"""`dbtrain monitor RUN --web` as a shell starts and ends it."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, finish, start, unchanged
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory


@pytest.fixture
def run(small_config: Callable[..., RunConfig], tmp_path: Path) -> RunDirectory:
    return start_run(small_config(), tmp_path / "run")


@pytest.mark.parametrize(("number", "as_json"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_it_serves_until_it_is_ended(run: RunDirectory, tmp_path: Path, number: int, as_json: bool) -> None:
    with unchanged(tmp_path):
        process = start("monitor", run.uri, "--web", "--port", 0, *(["--json"] if as_json else []))
        assert process.stdout is not None
        line = process.stdout.readline()
        url = json.loads(line)["url"] if as_json else line.strip()
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"<title>dbtrain monitor</title>" in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(url[:-1], timeout=20)
        process.send_signal(number)
        result = finish(process, 30)
    assert result.code == 0
    assert "Traceback" not in result.stderr


def test_mistakes(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(dbtrain("monitor", tmp_path / "no", "--web"), "is not a run directory")
    assert_refused(dbtrain("monitor", run.uri, "--web", "--bind", "0.0.0.0"), "--bind", "DBTRAIN_TOKEN", "ssh -L")
    monkeypatch.setenv("DBTRAIN_TOKEN", "simple")
    assert_refused(dbtrain("monitor", run.uri, "--web"), "DBTRAIN_TOKEN", "16 to 200")
    assert_refused(dbtrain("monitor", run.uri, "--web", "--port", 70000), "--port")
    assert_refused(dbtrain("monitor", run.uri, "--web", "--samples", 0), "--samples")
    assert_refused(dbtrain("monitor", run.uri, "--web", "--every", 5), "--every", "--web")
    result = dbtrain("monitor", run.uri, "--token", "of-a-page-0123456789")
    assert_refused(result, "--token", "add --web")
    assert "0123456789" not in result.stderr
