"""The table of blocks for a terminal: what a cell says, and which columns give way where there is little room."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from dbtrain.monitoring.plain_text import plain
from dbtrain.monitoring.run_view import BlockView, RunView
from dbtrain.monitoring.sparkline import Glyphs, bar, sparkline
from dbtrain.monitoring.terminal import STATE_STYLES, duration, noise_text
from dbtrain.plan import human_bytes


@dataclass(frozen=True, slots=True)
class Look:
    """What a picture of a run depends on."""

    view: RunView
    now: float
    """Seconds since 1970."""
    glyphs: Glyphs


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    title: str
    cell: Callable[[BlockView, Look, int], Text]
    """Of a block, given a width; only flexible ones heed it."""
    least: int = 0
    """Room for the usual values: a table that jumps cannot be read."""
    most: int | None = None
    """Flexible columns take up to this width, and anything down to `least`; numbers are never cut."""
    left: bool = False


def table_lines(blocks: Sequence[BlockView], look: Look, width: int | None) -> tuple[Text, list[Text]]:
    """The line of titles, and one for each block, at most `width` cells wide; None for as wide as need be."""
    full = {column.title: [column.cell(block, look, column.most or 0) for block in blocks] for column in COLUMNS}
    extents = {column.title: _extent(column, full[column.title]) for column in COLUMNS}
    shown = list(COLUMNS)

    def spare() -> int:
        return 10**6 if width is None else width + 1 - sum(extents[column.title][0] + 1 for column in shown)

    for title in GIVE_WAY:
        if spare() < 0:
            shown = [column for column in shown if column.title != title]
    rest, widths = max(spare(), 0), []
    for column in shown:
        least, most = extents[column.title]
        widths.append(least + min(rest, most - least))
        rest -= widths[-1] - least
    lines = [[Text(column.title) for column in shown]]
    lines += [[column.cell(block, look, room) for column, room in zip(shown, widths, strict=True)] for block in blocks]
    titles, *rows = [
        Text(" ").join(_fit(*part, look) for part in zip(line, shown, widths, strict=True)) for line in lines
    ]
    return titles, rows


def _extent(column: Column, cells: Sequence[Text]) -> tuple[int, int]:
    """Least and greatest width of a column."""
    natural = max([cell_len(column.title), *(cell.cell_len for cell in cells)])
    if column.most is None:
        return max(natural, column.least), max(natural, column.least)
    return min(natural, column.least), min(natural, column.most)


def _fit(cell: Text, column: Column, width: int, look: Look) -> Text:
    if cell.cell_len > width:
        cell.truncate(width - 1)
        cell.append(look.glyphs.cut)
    cell.align("left" if column.left else "right", width)
    return cell


def _state(block: BlockView, look: Look, width: int) -> Text:
    workers = f" x{block.replicas}" if block.replicas > 1 and block.running else ""
    return Text(f"{block.state}{workers}", style=STATE_STYLES[block.state])


def _device(block: BlockView, look: Look, width: int) -> Text:
    return Text("-" if block.node is None else plain(f"{block.device} @ {block.node}"))


def _loss(block: BlockView, look: Look, width: int) -> Text:
    if not block.losses.values:
        return Text("-")
    return Text(loss_text(block.loss), style="" if math.isfinite(block.loss) else "bold red")


def _curve(block: BlockView, look: Look, width: int) -> Text:
    _, values = block.losses.thinned(width)
    return Text(sparkline(values, look.glyphs), style="cyan")


def _rate(block: BlockView, look: Look, width: int) -> Text:
    return Text(si_text(block.samples_per_second) if block.running else "-")


def _flops(block: BlockView, look: Look, width: int) -> Text:
    return Text(si_text(block.flops_per_second) if block.running else "-")


def _saved(block: BlockView, look: Look, width: int) -> Text:
    return Text("-" if block.checkpoint_at is None else duration(max(look.now - block.checkpoint_at, 0)))


def _left(block: BlockView, look: Look, width: int) -> Text:
    return Text(duration(look.view.seconds_left(block)) if block.running else "-")


COLUMNS = (
    Column("block", lambda block, look, width: Text(str(block.index)), left=True),
    Column("layers", lambda block, look, width: Text(layers_text(block)), left=True),
    Column("noise", lambda block, look, width: Text(noise_text(block.layout)), left=True),
    Column("state", _state, least=10, left=True),
    Column("device", _device, least=10, most=40, left=True),
    Column("step", lambda block, look, width: Text(f"{block.step}/{block.total}")),
    Column("done", lambda block, look, width: Text(bar(block.fraction, width, look.glyphs)), least=6, most=10),
    Column("loss", _loss, least=6),
    Column("curve", _curve, least=8, most=24, left=True),
    Column("samples/s", _rate),
    Column("FLOP/s", _flops, least=7),
    Column("memory", lambda block, look, width: Text(memory_text(block)), least=8),
    Column("restarts", lambda block, look, width: Text(str(block.restarts))),
    Column("saved", _saved, least=7),
    Column("ETA", _left, least=7),
)
"""From left to right. `saved` is the age of the newest checkpoint."""
GIVE_WAY = (
    *("layers", "FLOP/s", "done", "noise", "memory", "device", "saved"),
    *("restarts", "curve", "samples/s", "ETA", "loss", "state"),
)
"""What is left out first, second and so on: what the plan says anyway goes before what tells whether a run is well."""


def layers_text(block: BlockView) -> str:
    """First and last layer."""
    return f"{block.layout.layers[0]}-{block.layout.layers[1] - 1}"


def loss_text(loss: float) -> str:
    """With so many digits that a change can be seen."""
    if not math.isfinite(loss):
        return "nan"
    return f"{loss:.4f}" if 0.001 <= abs(loss) < 10_000 or loss == 0 else f"{loss:.2e}"


def memory_text(block: BlockView) -> str:
    """Its peak; a dash where it was not told."""
    return "-" if block.peak_memory is None else human_bytes(block.peak_memory)


def si_text(value: float) -> str:
    """A rate with three digits: 0.52, 12.3, 456, 7.89 k, 1.20 T; a dash where there is none."""
    if not (math.isfinite(value) and value > 0):
        return "-"
    for unit in ("", " k", " M", " G", " T", " P"):
        if value < 999.5:
            digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f}{unit}"
        value /= 1000
    return f"{value:.2e} E"
