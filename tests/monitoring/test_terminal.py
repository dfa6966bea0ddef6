from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from dbtrain.monitoring.terminal import duration, status_table, watch_terminal
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.state import BlockState, BlockStatus
from dbtrain.plan import BlockPlan, Bytes, NoiseRange, Plan

NO_BYTES = Bytes(parameters=0, buffers=0, gradients=0, optimiser=0, ema=0, activations=0)


def make_plan() -> Plan:
    ranges = [NoiseRange(low=0.5, high=80.0), NoiseRange(low=0.1, high=0.5), NoiseRange(low=0.002, high=0.1)]
    blocks = [
        BlockPlan(
            index=index,
            layers=(2 * index, 2 * index + 2),
            noise=noise,
            trained=noise,
            parameters=1,
            bytes=NO_BYTES,
            evaluations=1,
            flops_per_sample=1,
        )
        for index, noise in enumerate(ranges)
    ]
    return Plan(
        kind="blocks",
        name="demo",
        config_sha256="0",
        codebook_sha256=None,
        seed=0,
        steps=100,
        batch_size=64,
        threads=1,
        blocks=tuple(blocks),
    )


RUNNING = BlockStatus(
    0,
    state=BlockState.RUNNING,
    attempt=2,
    restarts=1,
    step=40,
    loss=0.12345,
    samples_per_second=32.0,
    pid=4711,
    node="10.0.0.3",
    device="cuda:1",
)


def snapshot(*blocks: BlockStatus, stopping: bool = False) -> Snapshot:
    return Snapshot(run="/runs/a", plan=make_plan(), blocks=blocks, slots=2, stopping=stopping)


def render(view: Snapshot, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None)
    console.print(status_table(view))
    return console.export_text()


def test_table_shows_every_block_with_what_is_known_of_it() -> None:
    failed = BlockStatus(1, state=BlockState.FAILED, step=7, reason="gradients were not finite")
    text = render(snapshot(RUNNING, failed, BlockStatus(2)))
    row = next(line for line in text.splitlines() if "running" in line)
    for part in ("0-1", "80..0.5", "cuda:1 @ 10.0.0.3", "40/100", "0.1235", "32"):
        assert part in row
    assert row.split()[-3:] == ["2m", "0s", "1"]
    assert "block 1: gradients were not finite" in text
    waiting = next(line for line in text.splitlines() if "pending" in line)
    assert "nan" not in waiting
    assert "0.1..0.002" in waiting


def test_table_of_an_end_to_end_run_has_no_noise_range() -> None:
    plan = make_plan()
    whole = plan.model_copy(update={"blocks": (plan.blocks[0].model_copy(update={"noise": None}),)})
    assert "None" not in render(replace(snapshot(BlockStatus(0)), plan=whole))


def test_table_fits_a_narrow_terminal() -> None:
    text = render(snapshot(RUNNING), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("running", "40/100", "0.1235", "2m 0s", "restarts"):
        assert part in text


def test_a_stop_is_told() -> None:
    assert "stopping" in render(snapshot(RUNNING, stopping=True))


def test_elsewhere_than_on_a_terminal_only_changes_of_state_are_told() -> None:
    out = io.StringIO()
    with watch_terminal(Console(file=out, width=60)) as watcher:
        watcher.update(snapshot(BlockStatus(0)))
        watcher.update(snapshot(RUNNING))
        watcher.update(snapshot(replace(RUNNING, step=60)))
        reason = "the process [red]died[/red]"
        watcher.update(snapshot(replace(RUNNING, step=61, state=BlockState.RESTARTING, pid=None, reason=reason)))
    assert out.getvalue().splitlines() == [
        "block 0: running at step 40 of 100, attempt 2, process 4711 on 10.0.0.3",
        "block 0: restarting at step 61 of 100, attempt 2: the process [red]died[/red]",
    ]


def test_every_state_and_every_trouble_is_shown() -> None:
    for state in BlockState:
        assert str(state) in render(snapshot(replace(RUNNING, state=state)))
    unwell = replace(RUNNING, seats=2, slow="takes 4 times as long", trouble="no room", leaving="it is slow here")
    text = render(snapshot(replace(unwell, rollbacks=1)))
    assert "running x2" in text
    for remark in ("takes 4 times as long", "no room", "it is slow here", "back to a checkpoint once"):
        assert f"block 0: {remark}" in text or remark in text


def test_a_trouble_is_told_once_and_again_when_it_comes_back() -> None:
    out = io.StringIO()
    with watch_terminal(Console(file=out, width=60)) as watcher:
        for trouble in (None, "no room", "no room", None, "no room"):
            watcher.update(snapshot(replace(RUNNING, trouble=trouble)))
    assert out.getvalue().splitlines()[1:] == ["block 0: no room"] * 2


def test_on_a_terminal_the_last_state_stays_visible() -> None:
    out = io.StringIO()
    with watch_terminal(Console(file=out, width=120, force_terminal=True)) as watcher:
        watcher.update(snapshot(RUNNING))
        watcher.update(snapshot(replace(RUNNING, state=BlockState.FINISHED, step=100)))
    assert "100/100" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m 0s"),
        (200, "3m 20s"),
        (7500, "2h 5m"),
        (4 * 86400 + 3 * 3600, "4d 3h"),
        (math.inf, "-"),
        (math.nan, "-"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
