from __future__ import annotations

import math

import pytest
from run_views import NOW, block_view, look, run_view

from dbtrain.monitoring.columns import GIVE_WAY, loss_text, si_text, table_lines
from dbtrain.monitoring.run_view import BlockView
from dbtrain.monitoring.sparkline import ASCII
from dbtrain.orchestration.state import BlockState


def table(*blocks: BlockView, width: int | None = None) -> tuple[str, list[str]]:
    titles, rows = table_lines(blocks, look(run_view(*blocks)), width)
    return titles.plain, [row.plain for row in rows]


def test_a_row_says_what_is_known_of_a_block() -> None:
    titles, (row,) = table(block_view(1, restarts=2))
    assert titles.split() == [
        *("block", "layers", "noise", "state", "device", "step", "done", "loss", "curve"),
        *("samples/s", "FLOP/s", "memory", "restarts", "saved", "ETA"),
    ]
    parts = row.split()
    assert parts[:8] == ["1", "2-3", "80..0.5", "running", "cuda:1", "@", "10.0.0.3", "400/1000"]
    assert parts[8] == "████░░░░░░"
    assert parts[9:11] == ["0.1234", "█▄▁▁"]
    # 600 steps of 64 samples are left.
    assert parts[11:] == ["48.0", "1.20", "T", "412.3", "MB", "2", "1m", "35s", "13m", "20s"]


def test_what_is_not_known_is_a_dash() -> None:
    block = block_view(0, state=BlockState.PENDING, node=None, peak_memory=None, checkpoint_at=None)
    block.losses.steps.clear()
    block.losses.values.clear()
    _, (row,) = table(block)
    assert row.split()[4] == "-"
    assert row.split()[7:] == ["-", "-", "-", "-", "0", "-", "-"]
    _, (row,) = table(block_view(0, loss=math.nan))
    assert "nan" in row


def test_several_workers() -> None:
    assert "running x2" in table(block_view(0, replicas=2))[1][0]


def test_columns_give_way_in_order_and_numbers_are_never_cut() -> None:
    blocks = [block_view(0, node="a-node-with-a-very-long-name.example.org"), block_view(1, step=999)]
    full = table(*blocks)[0].split()
    before = set(full)
    for width in range(220, 13, -1):
        titles, rows = table(*blocks, width=width)
        assert {len(line) for line in [titles, *rows]} == {len(titles)}
        assert len(titles) <= width
        shown = titles.split()
        gone = [title for title in GIVE_WAY if title not in shown]
        assert gone == list(GIVE_WAY[: len(gone)])
        assert set(shown) <= before
        before = set(shown)
        for title, number in (("samples/s", "48.0"), ("step", "999/1000"), ("memory", "412.3 MB"), ("ETA", "1s")):
            assert title not in shown or number in rows[1]
    assert before == {"block", "step"}


def test_a_device_is_cut_before_columns_go() -> None:
    block = block_view(0, node="a-node-with-a-very-long-name.example.org")
    width = len(table(block)[0]) - 20
    titles, (row,) = table(block, width=width)
    assert len(titles.split()) == 15
    assert "…" in row
    assert "~" in table_lines([block], look(run_view(block), ASCII), width)[1][0].plain


def test_wide_characters_and_crafted_names_keep_the_table_straight() -> None:
    blocks = [block_view(0, node="模型" * 30), block_view(1, node="\x1b[2J[red]x\n")]
    titles, rows = table_lines(blocks, look(run_view(*blocks)), 150)
    assert {line.cell_len for line in [titles, *rows]} == {titles.cell_len}
    assert "\x1b" not in rows[1].plain
    assert "[red]x" in rows[1].plain


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "-"),
        (math.inf, "-"),
        (0, "-"),
        (0.0123, "0.01"),
        (0.5, "0.50"),
        (9.996, "10.0"),
        (99.96, "100"),
        (999.4, "999"),
        (999.6, "1.00 k"),
        (30_947_524_867.0, "30.9 G"),
        (1.2e12, "1.20 T"),
        (1e300, "1.00e+282 E"),
    ],
)
def test_rates(value: float, text: str) -> None:
    assert si_text(value) == text


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (0, "0.0000"),
        (2.30259, "2.3026"),
        (-0.5, "-0.5000"),
        (1e-5, "1.00e-05"),
        (123456, "1.23e+05"),
        (math.inf, "nan"),
    ],
)
def test_losses(loss: float, text: str) -> None:
    assert loss_text(loss) == text


def test_the_age_of_a_checkpoint_of_another_clock_is_not_negative() -> None:
    assert " 0s " in table(block_view(0, checkpoint_at=NOW + 50))[1][0]
