"""docs/tutorial.md is followed as a newcomer does: its program, its configuration and its commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dbtrain.cli.main import run

GUIDE = Path(__file__).parents[1] / "docs" / "tutorial.md"
DBTRAIN = Path(sys.executable).with_name("dbtrain")
SHORTER = ("--set", "training.steps=20", "--set", "schedule.warmup_steps=2", "--set", "logging.every=5")


def _run(place: Path, *command: str) -> str:
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|yaml|console)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert [language for language, _ in blocks].count("console") >= 8
    shown: dict[str, str] = {}
    said: dict[str, str] = {}
    for language, block in blocks:
        if language == "yaml":
            (tmp_path / "mine.yaml").write_text(block)
        elif language == "python":
            _run(tmp_path, sys.executable, "-c", block)
        else:
            for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
                program, *arguments = shlex.split(command)
                assert program == "dbtrain"
                shown[arguments[0]] = output
                if arguments[0] in ("train", "baseline"):  # with a Ray of their own
                    said[arguments[0]] = _run(tmp_path, str(DBTRAIN), *arguments, *SHORTER)
                else:
                    assert run(arguments) == 0, command
                    said[arguments[0]] = "".join(capsys.readouterr())
    for verb in ("prepare", "plan"):  # what depends on no training is shown to the letter
        assert _lines(shown[verb]) <= _lines(said[verb])
    readouts = [line.split()[0] for line in shown["evaluate"].splitlines()[3:]] if shown["evaluate"] else []
    assert all(name in said["evaluate"] for name in readouts)
    rows = [re.split(r"\s{2,}", line)[0] for line in shown["compare"].splitlines()[3:]]
    assert len(rows) == 6
    assert all(row in said["compare"] for row in rows)
    assert "3 finished" in said["status"]
    assert "3 finished" in said["monitor"]  # one look, as this is no terminal
    assert "digit-" in said["predict"]
    report = (tmp_path / "runs/mine/report.html").read_text()
    assert "mine-baseline" in report
    assert "Traceback" not in "".join(said.values())


def _lines(text: str) -> set[str]:
    return {line.rstrip() for line in text.splitlines()}
