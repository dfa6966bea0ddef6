from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_wheel_has_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build", reason="wheels are built by hatchling")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(os.fspath(tmp_path))) as wheel:
        names = set(wheel.namelist())
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dbtrain/monitoring/web/page").iterdir()}
    assert len(pages) >= 7
    assert pages <= names
