"""Command lines as a test gives them, and what came of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.cli.main import run

DBTRAIN = Path(sys.executable).with_name("dbtrain")


@dataclass(frozen=True)
class Result:
    """How a command line ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        """The one object on standard output; NaN and infinity are not JSON."""
        assert self.stdout.count("\n") == 1, self.stdout
        assert self.stdout.endswith("\n")

        def refuse(text: str) -> float:
            raise AssertionError(text)

        parsed: dict[str, Any] = json.loads(self.stdout, parse_constant=refuse)
        assert isinstance(parsed, dict)
        return parsed


def dbtrain(*arguments: object) -> Result:
    """Carry out a command line in this process: the same code as the installed command, without its start-up time."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run([str(argument) for argument in arguments])
    return Result(code, stdout.getvalue(), stderr.getvalue())


def start(*arguments: object) -> subprocess.Popen[str]:
    """The installed command as the leader of a process group of its own, as a shell starts it."""
    command = [str(DBTRAIN), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)


def finish(process: subprocess.Popen[str], timeout: float = 180) -> Result:
    """Wait for it."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Result(process.returncode, stdout, stderr)


def assert_refused(result: Result, *parts: str) -> None:
    """A user's mistake: exit code 2 and one line on standard error that holds all `parts`; nothing else anywhere."""
    assert "Traceback" not in result.stderr, result.stderr
    assert (result.code, result.stdout) == (2, ""), result
    assert result.stderr.startswith("dbtrain: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    assert not [part for part in parts if part not in result.stderr], (parts, result.stderr)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the digest of its bytes, and every folder.

    Left out are stamps of verified shards: they only save time.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != ".verified.json":
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path.relative_to(folder))] = content
    return found


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Whatever happens inside leaves every file below the folder as it was, and adds none."""
    before = tree(folder)
    yield
    assert tree(folder) == before


def overrides(*texts: str) -> Sequence[str]:
    """`--set` before each."""
    return [part for text in texts for part in ("--set", text)]
