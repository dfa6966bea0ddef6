"""Words and tables for people: on a terminal, in a pipe, and in the help."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from command import DBTRAIN, dbtrain
from PIL import Image
from rich.console import Console

from dbtrain.cli import output
from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.plan import Plan

VERBS = (
    "prepare", "plan", "train", "baseline", "assemble", "evaluate", "predict", "sample", "export", "compare", "figures",
    "report",
)  # fmt: skip
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(columns: int, *arguments: object) -> tuple[int, str]:
    """Exit code and screen text of the installed command on a terminal of that width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [str(DBTRAIN), *map(str, arguments)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(slave)
    received = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not data:
            break
        received += data
    os.close(master)
    return process.wait(timeout=60), ESCAPES.sub("", received.decode()).replace("\r", "")


def test_the_plan_fits_a_terminal_of_80_columns(recipe: Path) -> None:
    code, screen = on_a_terminal(80, "plan", recipe)
    assert code == 0
    assert max(map(len, screen.splitlines())) <= 80
    assert "…" not in screen
    rows = [line.split() for line in screen.splitlines() if re.match(r"(\d|all) ", line)]
    assert [row[:3] for row in rows] == [
        ["0", "0-1", "80..0.505"],
        ["1", "2-2", "0.505..0.18"],
        ["2", "3-3", "0.18..0.002"],
        ["all", "0-3", "-"],
    ]
    assert "codebook: " in screen


def test_a_calibration_is_told_beside_the_memory(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(config: RunConfig, plan: Plan) -> float:
        if plan.kind == "end_to_end":
            raise UserError("block 0 ran out of memory")
        return 500.0

    monkeypatch.setattr("dbtrain.training.calibration.seconds_a_step", seconds)
    shown = dbtrain("plan", recipe, "--calibrate").stdout.splitlines()
    needed = next(line.split()[-3:-1] for line in shown if line.startswith("0 "))
    assert shown[-3:] == [
        "on this cpu, 1 thread:",
        f"  B = 3 needs {' '.join(needed)} and 2h 46m a worker: 20 steps of 500 s (block 0)",
        "  end to end: block 0 ran out of memory",
    ]


def test_plan_of_a_family_without_codebook_names_none(family_config: Callable[..., RunConfig], place: Path) -> None:
    (place / "dit.yaml").write_text(family_config("dit").to_yaml())
    assert "codebook" not in dbtrain("plan", "dit.yaml").stdout
    assert dbtrain("plan", "dit.yaml", "--json").json()["codebook_sha256"] is None


def test_a_table_is_never_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(output, "out", Console(width=20))
    output.print_table("a title of some length", ["first", "two\nlines"], [["x" * 30, "1"], ["y", "22,000,000"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a title of some length"
    assert lines[-3:] == ["x" * 30 + "          1", "y" + " " * 30 + "22,000,000", ""]


def test_nothing_for_terminals_alone_in_a_pipe(trained_runs: Path, run_copy: Path) -> None:
    Image.new("L", (8, 8)).save("a.png")
    run, baseline = run_copy, trained_runs / "baseline"
    for line in (
        ("evaluate", run),
        ("compare", run, baseline),
        ("predict", run, "a.png"),
        ("assemble", run),
    ):
        result = dbtrain(*line)
        assert (result.code, result.stderr) == (0, ""), line
        assert "\x1b" not in result.stdout
        assert result.stdout.isascii() or "─" in result.stdout
        assert max(map(len, result.stdout.splitlines())) < 160


def test_predictions_are_columns_for_cut_and_awk(trained_runs: Path, place: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(name)
    lines = dbtrain("predict", trained_runs / "run", "a.png", "b.png").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a.png", "b.png"]
    assert all(0 <= float(line.split("\t")[2]) <= 1 for line in lines)


def test_training_tells_the_next_step(recipe: Path, place: Path) -> None:
    result = dbtrain("train", recipe, "--backend", "inline", "--set", "training.steps=2")
    assert result.stdout == f"finished: {place / 'runs' / 'small'}\n"
    assert result.stderr.splitlines()[-1] == f"next: dbtrain assemble {place / 'runs' / 'small'}"


def test_preparing_tells_what_to_write_into_the_configuration(place: Path) -> None:
    for label in ("cat", "dog"):
        (place / "pets" / label).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (20, 16)).save(place / "pets" / label / f"{index}.png")
    result = dbtrain("prepare", "pets", "--size", 16)
    assert result.stdout == "data/pets: 6 train, 2 test images of 3x16x16, 2 classes\n"
    assert "data: {source: pets, path: data/pets}" in result.stderr
    assert "model: {image_size: 16, channels: 3, num_classes: 2}" in result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_has_an_example_that_fits(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = dbtrain(verb, "--help")
    assert result.code == 0
    assert f"Example:  dbtrain {verb} " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_without_a_verb_the_verbs_are_listed() -> None:
    result = dbtrain()
    assert result.code == 0
    assert all(f" {verb} " in result.stdout for verb in VERBS)


def test_version() -> None:
    assert re.fullmatch(r"dbtrain \d+\.\d+\.\d+\S*\n", dbtrain("--version").stdout)


def test_help_and_mistakes_wait_for_no_library() -> None:
    program = (
        "import sys\n"
        "from dbtrain.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        "assert run(['train', 'no.yaml']) == 2\n"
        "sys.exit(' '.join({'torch', 'ray', 'matplotlib'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
