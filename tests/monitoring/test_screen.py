from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from run_views import NOW, block_view, look, metrics_line, run_view

from dbtrain.monitoring.run_view import Notice, RunState, RunView
from dbtrain.monitoring.screen import Page, Screen, draw
from dbtrain.orchestration.state import BlockState

S = BlockState


def shown(view: RunView, screen: Screen | None = None, width: int = 150, height: int = 24, **more: Any) -> list[str]:
    lines = draw(screen or Screen(), look(view), more.get("problem"), more.get("log", []), width, height)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines)
    return [line.plain.rstrip() for line in lines]


def pressed(view: RunView, *keys: str) -> Screen:
    screen = Screen()
    for key in keys:
        screen.press(key, view)
    return screen


def rows(lines: Sequence[str]) -> list[int]:
    """Blocks in the order of the table."""
    first = next(number for number, line in enumerate(lines) if line.startswith("  block")) + 1
    return [int(line[2:].split()[0]) for line in lines[first:] if line[2:3].isdigit()]


def marked(lines: Sequence[str]) -> int:
    (line,) = [line for line in lines if line.startswith("▸ ")]
    return int(line[2:].split()[0])


def test_five_seconds_are_enough() -> None:
    view = run_view(block_view(0), block_view(1, step=200), block_view(2, state=S.FINISHED, step=1000))
    lines = shown(view)
    assert lines[0] == "demo  running"
    assert lines[1] == "/runs/a"
    assert lines[2].startswith("process 71 on host, ray, room for 2; began ")
    assert lines[2].endswith(", 2m 0s ago")
    # (400 + 200 + 1000) / 3000; block 1 has 800 steps of 64 samples left at 48 a second.
    assert lines[3].endswith("53%, 3 blocks: 2 running, 1 finished; slowest: block 1, 17m 47s left")
    assert rows(lines) == [0, 1, 2]
    assert any("block 0 running at step 0" in line for line in lines)
    assert lines[-1].startswith("q leave  ? help")


def test_an_ended_run() -> None:
    view = run_view(block_view(0, state=S.FINISHED, step=1000), state=RunState.FINISHED, starts=2, ended_at=NOW - 20)
    line = shown(view)[2]
    assert "; start 2; began " in line
    assert line.endswith(" after 1m 40s")
    assert "no driver has begun it" in shown(run_view(block_view(0, state=S.PENDING), starts=0, state=RunState.NEW))


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        ((), [0, 1, 2, 3]),
        (("r",), [3, 2, 1, 0]),
        (("s",), [2, 0, 1, 3]),  # failed, running twice, finished
        (("s", "s"), [2, 0, 1, 3]),
        (("s", "s", "s"), [3, 1, 0, 2]),  # what is not finite comes last
        (("s", "s", "s", "s"), [1, 0, 2, 3]),  # and what does not run has no speed
        (("s", "s", "s", "s", "s"), [0, 1, 2, 3]),
    ],
)
def test_sorting(keys: Sequence[str], order: list[int]) -> None:
    view = run_view(
        block_view(0, step=300, loss=0.5, samples_per_second=40.0),
        block_view(1, step=400, loss=0.4, samples_per_second=30.0),
        block_view(2, step=10, state=S.FAILED, loss=math.nan, reason="out of memory"),
        block_view(3, step=1000, state=S.FINISHED, loss=0.1, samples_per_second=1.0),
    )
    assert rows(shown(view, pressed(view, *keys))) == order


def test_the_selection_stays_with_its_block() -> None:
    view = run_view(*(block_view(index, step=10 * index) for index in range(5)))
    screen = pressed(view, "down", "j", "j", "up")
    assert marked(shown(view, screen)) == 2
    screen.press("r", view)
    assert rows(shown(view, screen)) == [4, 3, 2, 1, 0]
    assert marked(shown(view, screen)) == 2
    screen.press("down", view)
    assert marked(shown(view, screen)) == 1
    for key, index in (("end", 0), ("down", 0), ("home", 4), ("up", 4), ("x", 4)):
        screen.press(key, view)
        assert marked(shown(view, screen)) == index


@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 16, 24, 60, 200])
def test_a_hundred_blocks_scroll(height: int) -> None:
    view = run_view(*(block_view(index) for index in range(100)))
    screen = Screen()
    for index in (0, 1, 50, 98, 99):
        screen.selected = index
        lines = shown(view, screen, height=height)
        assert lines[-1].startswith("q leave")
        if height >= 3:
            assert marked(lines) == index
    if height == 24:
        assert any(line.startswith("blocks 8") and line.endswith("of 100") for line in lines)
    if height == 200:
        assert rows(lines) == list(range(100))


def test_narrow_and_crafted() -> None:
    nasty = "\x1b[2J\x1b]0;x\x07[bold]name\r\n"
    view = run_view(block_view(0, reason=nasty, node=nasty), name=nasty, uri=f"/runs/{nasty}", driver=nasty)
    view.notices = [Notice(NOW, "block_failed", 0, f"failed: {nasty}")]
    for width in (10, 40, 80, 200):
        for page in Page:
            for line in shown(view, Screen(page=page), width=width, log=[nasty], problem=nasty):
                assert line.isprintable()
    assert "[bold]name" in "\n".join(shown(view))


def test_trouble_is_told_together() -> None:
    view = run_view(
        *(block_view(index, state=S.FAILED, reason="out of memory") for index in range(3)),
        block_view(3, rollbacks=2),
        block_view(4, loss=math.nan),
        block_view(5, heard_at=NOW - 300),
        block_view(6, heard_at=NOW - 300, recent=[metrics_line(1, time=NOW - 700), metrics_line(2, time=NOW - 300)]),
        block_view(7, state=S.FINISHED, reason="was lost once"),
    )
    text = "\n".join(shown(view, height=40))
    for line in (
        "blocks 0, 1, 2: out of memory",
        "block 3: has gone back to a checkpoint 2 times: values were not finite",
        "block 4: its loss is not finite",
        "block 5: nothing heard for 5m 0s",
    ):
        assert line in text
    assert "block 6: " not in text  # it takes its time for a line
    assert "was lost once" not in text
    assert "and 1 more trouble" not in text
    view.blocks[3].reason = "slow"
    assert "and 2 more troubles" in "\n".join(shown(view, height=40))


def test_an_interrupted_run_says_what_to_do() -> None:
    blocks = [block_view(index, state=S.STOPPED, reason="the driver is gone") for index in range(9)]
    view = run_view(*blocks, state=RunState.INTERRUPTED, ended_at=NOW - 10)
    text = "\n".join(shown(view, height=40))
    assert "the driver is gone without an end: `dbtrain train`" in text
    assert "9 blocks:" not in text.replace("9 blocks: 9 stopped", "")


def test_a_directory_that_cannot_be_read_is_told() -> None:
    assert "cannot be read just now: Stale file handle" in shown(run_view(block_view(0)), problem="Stale file handle")


def test_the_log_page_scrolls_and_goes_back() -> None:
    view = run_view(block_view(0), block_view(1))
    view.blocks[1].recent = [
        metrics_line(350, 0.2),
        {"event": "rolled_back", "step": 300, "time": NOW, "reason": "nan"},
    ]
    view.notices = [Notice(NOW, "x", block, f"notice of {block}") for block in (0, 1)]
    screen = pressed(view, "down", "enter")
    log = [f"log line {number}" for number in range(100)]
    lines = shown(view, screen, log=log)
    assert lines[0] == "block 1  layers 2-3  noise 80..0.5  running at step 400 of 1000, attempt 1"
    assert lines[1].startswith("process 4712 on 10.0.0.3, cuda:1, peak memory 412.3 MB")
    assert "log line 99" in lines
    screen.press("home", view)
    text = "\n".join(shown(view, screen, log=log))
    assert "notice of 1" in text
    assert "notice of 0" not in text
    assert "step 350  loss 0.2000  gradient 0.5  lr 0.001  50.0 samples/s" in text
    assert "rolled_back to step 300: nan" in text
    screen.press("page down", view)
    assert shown(view, screen, log=log) != text.splitlines()
    screen.press("end", view)
    assert "log line 99" in shown(view, screen, log=log)
    screen.press("escape", view)
    assert rows(shown(view, screen)) == [0, 1]


def test_holding_help_and_leaving() -> None:
    view = run_view(block_view(0))
    assert "demo  running  held" in shown(view, pressed(view, "p"))
    assert not pressed(view, "p", "p").held
    assert any("sort by index, state, step, loss, speed" in line for line in shown(view, pressed(view, "?")))
    assert pressed(view, "?", "?").page is Page.TABLE
    assert pressed(view, "l", "q").left


def test_a_run_that_came_back_with_fewer_blocks() -> None:
    screen = Screen(selected=7)
    assert marked(shown(run_view(block_view(0), block_view(1)), screen)) == 1
