"""Who installs dbtrain gets all of it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_every_file_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(os.fspath(tmp_path))) as wheel:
        names = set(wheel.namelist())
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dbtrain").rglob("*") if path.is_file()}
    here = {name for name in here if "__pycache__" not in name}
    assert {Path(name).suffix for name in here} > {".py", ".html", ".css", ".js", ".sh"}
    assert here <= names
