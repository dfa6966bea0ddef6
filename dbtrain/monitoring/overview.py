"""A run in words for a terminal: how it stands, and what is wrong with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from rich.text import Text

from dbtrain.monitoring.columns import Look
from dbtrain.monitoring.plain_text import plain
from dbtrain.monitoring.run_view import BlockView, Notice, RunState, RunView
from dbtrain.monitoring.sparkline import Glyphs, bar
from dbtrain.monitoring.terminal import duration
from dbtrain.orchestration.state import BlockState

_STYLES = {
    RunState.NEW: "dim",
    RunState.RUNNING: "bold",
    RunState.FINISHED: "green",
    RunState.FAILED: "bold red",
    RunState.STOPPED: "yellow",
    RunState.INTERRUPTED: "bold yellow",
}
SILENT = 60.0
"""Seconds without a line of metrics from which on a running block may be silent."""
SILENT_LINES = 5
"""But it has to be silent for so many times what it took between its last two lines."""
_NAMED = 6  # blocks in one line of trouble
_BAR = 20  # cells


def head_lines(look: Look) -> list[Text]:
    """Name and state; where; by whom and since when; how far."""
    view = look.view
    name = Text.assemble((plain(view.name), "bold"), "  ", (str(view.state), _STYLES[view.state]))
    lines = [name, Text(plain(view.uri), style="dim")]
    if view.starts == 0:
        lines.append(Text("no driver has begun it"))
    else:
        lines.append(Text(plain(f"{view.driver}, {view.backend}, room for {view.slots}") + _times(view, look.now)))
    lines.append(_progress(look))
    return lines


def _times(view: RunView, now: float) -> str:
    assert view.started_at is not None
    text = f"; start {view.starts}" if view.starts > 1 else ""
    text += f"; began {clock(view.started_at, now)}"
    if view.ended_at is None:
        return f"{text}, {duration(now - view.started_at)} ago"
    end = "ended" if view.state is not RunState.INTERRUPTED else "last heard of"
    return f"{text}, {end} {clock(view.ended_at, now)} after {duration(view.ended_at - view.started_at)}"


def _progress(look: Look) -> Text:
    view = look.view
    counts = Counter(block.state for block in view.blocks)
    states = ", ".join(f"{counts[state]} {state}" for state in BlockState if counts[state])
    share = f"{bar(view.fraction, _BAR, look.glyphs)} {math.floor(100 * view.fraction)}%"
    text = f"{share}, {len(view.blocks)} blocks: {states}"
    slowest = max((b for b in view.blocks if b.running), key=view.seconds_left, default=None)
    if slowest is not None and math.isfinite(view.seconds_left(slowest)):
        text += f"; slowest: block {slowest.index}, {duration(view.seconds_left(slowest))} left"
    return Text(text)


def troubles(view: RunView, now: float) -> list[str]:
    """What is wrong, in sentences; blocks in the same trouble share one."""
    found: dict[str, list[int]] = {}
    for block in view.blocks:
        for text in _of_block(view, block, now):
            found.setdefault(plain(text), []).append(block.index)
    lines = [f"{_names(indices)}: {text}" for text, indices in found.items()]
    if view.state is RunState.INTERRUPTED:
        lines.insert(0, "the driver is gone without an end: `dbtrain train` with the same directory goes on")
    return lines


def _of_block(view: RunView, block: BlockView, now: float) -> list[str]:
    texts = []
    interrupted = view.state is RunState.INTERRUPTED and block.state is BlockState.STOPPED
    if block.reason is not None and block.state is not BlockState.FINISHED and not interrupted:
        texts.append(block.reason)
    if block.state is not BlockState.FINISHED and block.losses.values and not math.isfinite(block.loss):
        texts.append("its loss is not finite")
    if block.rollbacks:
        times = "once" if block.rollbacks == 1 else f"{block.rollbacks} times"
        texts.append(f"has gone back to a checkpoint {times}: values were not finite")
    if block.running and block.heard_at is not None and (silence := now - block.heard_at) > max(SILENT, _usual(block)):
        texts.append(f"nothing heard for {duration(silence)}")
    return texts


def _usual(block: BlockView) -> float:
    """Seconds after which a block is silent, by what it took between its last two lines."""
    times = [float(line["time"]) for line in block.recent[-2:]]
    return SILENT_LINES * (times[-1] - times[0]) if len(times) == 2 else 0.0


def _names(indices: Sequence[int]) -> str:
    if len(indices) > _NAMED:
        return f"{len(indices)} blocks"
    return f"block{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def notice_line(notice: Notice, now: float) -> Text:
    """One line of the journal: when, who, what."""
    who = "" if notice.block is None else f"block {notice.block} "
    return Text.assemble((clock(notice.time, now), "dim"), " ", plain(f"{who}{notice.text}"))


def clock(seconds: float, now: float) -> str:
    """A time of day, here; with the date unless it is today's."""
    try:
        then = datetime.fromtimestamp(seconds)
        today = then.date() == datetime.fromtimestamp(now).date()
    except (OverflowError, ValueError, OSError):  # no time that a calendar has
        return "-"
    return f"{then:%H:%M:%S}" if today else f"{then:%Y-%m-%d %H:%M:%S}"


def cropped(line: Text, width: int, glyphs: Glyphs) -> Text:
    """At most `width` cells of a line; what is cut off shows."""
    if line.cell_len > width:
        line = line.copy()
        line.truncate(max(width - 1, 0))
        line.append(glyphs.cut)
    return line
