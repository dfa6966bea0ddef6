"""What is sent to a cluster, and how it starts there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dbtrain
from dbtrain.orchestration.submission import last_words, pack, stopping_command, training_command


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """The folder as a job finds it."""
    folder = tmp_path / "sent"
    folder.mkdir()
    pack(folder, "name: a\n")
    return folder


def carry_out(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As Ray's job server does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["RAY_ADDRESS"] = "10.0.0.1:6379"
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_folder_is_a_dbtrain_of_its_own(sent: Path) -> None:
    code = "import dbtrain; print(dbtrain.__version__, dbtrain.__file__)"
    # Without site-packages: nothing of an installed one helps.
    done = carry_out(f"{sys.executable} -S -c '{code}'", sent)
    assert done.stdout == f"{dbtrain.__version__} {sent}/dbtrain/__init__.py\n", done.stderr


def test_the_first_interpreter_that_can_is_taken(sent: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder; of $mine"
    folder.mkdir()
    echo = script(folder / "python", f'[ "$1" = -c ] && exec {sys.executable} "$@"\nprintf "<%s>" "$@"')
    command = training_command("end_to_end", "/shared/it's a run", ["no-such-python", str(echo), sys.executable])
    done = carry_out(command, sent)
    expected = ["-m", "dbtrain", "baseline", "config.yaml", "--run", "/shared/it's a run", "--address", "10.0.0.1:6379"]
    assert done.stdout == "".join(f"<{word}>" for word in expected), done.stderr


def test_no_interpreter_will_do(sent: Path, tmp_path: Path) -> None:
    bare = script(tmp_path / "bare", f'exec {sys.executable} -S "$@"')
    done = carry_out(stopping_command("/shared/run", 30, ["no-such-python", str(bare)]), sent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for part in ("dbtrain: no interpreter", "no-such-python: there is none", "lacks torch, ray", "--python PATH"):
        assert part in done.stderr


def test_python_m_dbtrain_in_the_folder(sent: Path) -> None:
    done = carry_out(f"{sys.executable} -m dbtrain --version", sent)
    assert done.stdout == f"dbtrain {dbtrain.__version__}\n", done.stderr


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("", ""),
        ("Job is currently running.", "Job is currently running."),
        ("failed with exit code 1:\nTraceback\nKeyError", "failed with exit code 1:"),
        ("failed:\ndbtrain: warning: x\n\x1b[1;31mdbtrain:\x1b[0m why\x07 \x1b[2J\nbye", "why"),
    ],
)
def test_last_words(message: str, line: str) -> None:
    assert last_words(message) == line
