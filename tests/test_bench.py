"""The runner of benchmarks, on benchmarks of the test's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench
import pytest


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three benchmarks, of which the second fails; where their figures are to be written."""
    (tmp_path / "good.py").write_text('import sys; print(\'{"rate": 1234.5678, "arguments": %d}\' % len(sys.argv))')
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    rows = [{"family": "vit", "ms": 0.123456}, {"family": "dit", "more": {"a": {"b": True}}}]
    (tmp_path / "rows.py").write_text(f"print({json.dumps({'rows': rows})!r})")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "BENCHMARKS", {"good": ["--fast"], "bad": [], "rows": []})
    return tmp_path / "new" / "bench.json"


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    return bench.main()


def test_one_that_fails_keeps_no_other_from_being_run(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "--out", str(out)) == 1
    found = json.loads(out.read_text())
    assert found.keys() == {"good", "rows"}
    assert found["good"]["figures"] == {"rate": 1234.5678, "arguments": 3}
    assert found["good"]["about"].keys() >= {"processor", "cores", "device", "python", "versions", "commit", "date"}
    assert found["good"]["about"]["versions"].keys() >= {"torch", "ray", "pyarrow"}
    assert "machine" not in found["good"]["about"]
    printed = capsys.readouterr().out
    assert "| rate | 1235 |" in printed
    assert "| family | ms | more: a: b |\n| --- | --- | --- |\n| vit | 0.1235 |  |\n| dit |  | True |" in printed
    assert "failed: bad" in printed


def test_figures_of_those_not_run_this_time_stay(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _main(monkeypatch, "good", "--out", str(out)) == 0
    assert _main(monkeypatch, "rows", "--out", str(out)) == 0
    assert json.loads(out.read_text()).keys() == {"good", "rows"}
    with pytest.raises(SystemExit, match="2"):
        _main(monkeypatch, "nothing")


def test_every_benchmark_is_there() -> None:
    assert all((Path(bench.__file__).parent / f"{name}.py").is_file() for name in bench.BENCHMARKS)
