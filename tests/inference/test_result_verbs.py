from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dbtrain.cli.main import app
from dbtrain.errors import UserError
from dbtrain.run_directory import RunDirectory


def _answer(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_shards_that_have_moved(own_run: RunDirectory, baseline: RunDirectory, digits: Path, tmp_path: Path) -> None:
    path = Path(own_run.uri, "model/config.json")
    path.write_text(path.read_text().replace(str(digits), str(tmp_path / "gone")))
    moved = str(shutil.copytree(digits, tmp_path / "moved"))
    theirs = str(shutil.copytree(baseline.uri, tmp_path / "baseline"))
    found = _answer("evaluate", own_run.uri, "--baseline", theirs, "--data", moved)
    assert {"readouts", "baseline"} <= found.keys()
    Path(own_run.uri, "evaluation.json").unlink()
    with pytest.raises(UserError, match="--data"):
        _answer("compare", own_run.uri, theirs)
    assert set(_answer("compare", own_run.uri, theirs, "--data", moved)) == {"metric", "run", "baseline"}
    Path(own_run.uri, "evaluation.json").unlink()
    assert set(_answer("figures", own_run.uri, "--data", moved)) == {"loss.png", "chain.png"}


@pytest.mark.parametrize("verb", [["compare"], ["figures", "--baseline"], ["evaluate", "--baseline"]])
def test_only_an_end_to_end_run_is_a_baseline(own_run: RunDirectory, verb: list[str]) -> None:
    with pytest.raises(UserError, match="no end-to-end run"):
        _answer(verb[0], own_run.uri, *verb[1:], own_run.uri)
