from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_views import block_view, look, run_view

from dbtrain.monitoring.block_page import LOG_BYTES, page_lines, worker_log


def test_the_worker_s_log_is_found_by_its_process(tmp_path: Path) -> None:
    (tmp_path / "worker-ab-01-4711.out").write_text(":job_id:01\n:actor_name:BlockWorker\ndbtrain run /runs/a\n")
    (tmp_path / "worker-ab-01-4711.err").write_bytes(b"\xff warned\n")
    (tmp_path / "worker-cd-01-14711.out").write_text("another\n")
    view = run_view(block_view(0), worker_logs=str(tmp_path))
    assert worker_log(view, view.blocks[0]) == [
        f"{tmp_path}/worker-ab-01-4711.out:",
        "dbtrain run /runs/a",
        f"{tmp_path}/worker-ab-01-4711.err:",
        "\ufffd warned",
    ]


def test_only_the_end_of_a_long_log(tmp_path: Path) -> None:
    (tmp_path / "worker-ab-01-4711.out").write_text("".join(f"line {number}\n" for number in range(100_000)))
    view = run_view(block_view(0), worker_logs=str(tmp_path))
    lines = worker_log(view, view.blocks[0])
    assert lines[1] == "(the last 64 KiB)"
    assert lines[2].startswith("line 9")
    assert lines[-1] == "line 99999"
    assert len("\n".join(lines)) < LOG_BYTES + 200


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"worker_logs": None}, "the cluster, which the run has joined, keeps"),
        ({"worker_logs": "/no/such/folder"}, "/no/such/folder on the driver's machine; it is not there"),
        ({"worker_logs": "a\0b"}, "process 4711"),
        ({"backend": "inline"}, "the driver's own process"),
    ],
)
def test_why_there_is_no_log(fields: dict[str, object], said: str) -> None:
    view = run_view(block_view(0), **fields)
    (line,) = worker_log(view, view.blocks[0])
    assert said in line


def test_without_a_worker_there_is_none() -> None:
    view = run_view(block_view(0, pid=None), worker_logs="/tmp")
    assert worker_log(view, view.blocks[0]) == ["no worker in this start of the run"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_log_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "worker-ab-01-4711.out"
    path.touch(0)
    view = run_view(block_view(0), worker_logs=str(tmp_path))
    assert "cannot be read" in worker_log(view, view.blocks[0])[0]


def test_lines_are_wrapped_and_harmless() -> None:
    view = run_view(block_view(0))
    _, lines = page_lines(look(view), view.blocks[0], ["\x1b[31m" + "x" * 95 + "模型\x1b[0m"], 40)
    assert [line.plain for line in lines[-3:]] == ["x" * 40, "x" * 40, "x" * 15 + "模型"]
    assert all(line.cell_len <= 40 for line in lines)
