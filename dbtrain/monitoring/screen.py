"""The monitor's screen: what keys do to it, and what it shows. Nothing here reads or writes anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.text import Text

from dbtrain.monitoring.block_page import page_lines
from dbtrain.monitoring.columns import Look, table_lines
from dbtrain.monitoring.overview import cropped, head_lines, notice_line, troubles
from dbtrain.monitoring.plain_text import plain
from dbtrain.monitoring.run_view import BlockView, RunView
from dbtrain.orchestration.state import BlockState

_URGENCY = (
    *(BlockState.FAILED, BlockState.RESTARTING, BlockState.STARTING, BlockState.RUNNING),
    *(BlockState.PAUSED, BlockState.PENDING, BlockState.STOPPED, BlockState.FINISHED),
)


def _or_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


_ORDERS: dict[str, Callable[[BlockView], float]] = {
    "index": lambda block: block.index,
    "state": lambda block: _URGENCY.index(block.state),
    "step": lambda block: block.step,
    "loss": lambda block: _or_last(block.loss),
    "speed": lambda block: _or_last(block.samples_per_second if block.running else math.inf),
}
ORDERS = tuple(_ORDERS)
"""What blocks are sorted by, in the order of the key `s`: the most urgent state, the fewest steps, the lowest loss and
the slowest come first."""
PAGE = 10
"""Lines that page up and page down move by."""
_NOTICES, _TROUBLES = 6, 4  # lines
_ROOMY = 16
"""Lines of a terminal from which on some are kept for notices, however many blocks there are."""
HELP = """\
s            sort by index, state, step, loss, speed, in turn
r            the other way round
p            hold the picture, and go on
arrows, j k  select a block; page up and down, home and end (g G) too
Enter, l     the selected block's log
Esc          back
?            this
q, Ctrl-C    leave; the run is not touched"""


class Page(StrEnum):
    """What the screen shows."""

    TABLE = "table"
    LOG = "log"
    HELP = "help"


@dataclass(slots=True)
class Screen:
    """What a user has chosen."""

    page: Page = Page.TABLE
    order: str = ORDERS[0]
    reverse: bool = False
    held: bool = False
    """The picture stands still."""
    selected: int = 0
    """Index of a block."""
    back: int = 0
    """Lines of a log below the last one shown."""
    left: bool = False

    def press(self, key: str, view: RunView) -> None:
        """What a key does; unknown ones do nothing."""
        if key == "q":
            self.left = True
        elif key == "?":
            self.page = Page.TABLE if self.page is Page.HELP else Page.HELP
        elif key == "p":
            self.held = not self.held
        elif key == "escape":
            self.page = Page.TABLE
        elif self.page is Page.LOG:
            self.back = max(_moved(key, self.back, up=1), 0)
        elif self.page is Page.TABLE:
            self._press_in_table(key, view)

    def _press_in_table(self, key: str, view: RunView) -> None:
        if key == "s":
            self.order = ORDERS[(ORDERS.index(self.order) + 1) % len(ORDERS)]
        elif key == "r":
            self.reverse = not self.reverse
        elif key in ("enter", "l"):
            self.page, self.back = Page.LOG, 0
        else:
            shown = [block.index for block in self.sorted(view)]
            place = shown.index(self.selected) if self.selected in shown else 0
            self.selected = shown[min(max(_moved(key, place, up=-1), 0), len(shown) - 1)]

    def sorted(self, view: RunView) -> list[BlockView]:
        """The blocks in the order of the table; equal ones by their index."""
        return sorted(view.blocks, key=_ORDERS[self.order], reverse=self.reverse)

    def block(self, view: RunView) -> BlockView:
        """The selected one."""
        return view.blocks[min(self.selected, len(view.blocks) - 1)]


_FAR = 10**9
_MOVES = {
    **dict.fromkeys(("up", "k"), 1),
    **dict.fromkeys(("down", "j"), -1),
    "page up": PAGE,
    "page down": -PAGE,
    **dict.fromkeys(("home", "g"), _FAR),
    **dict.fromkeys(("end", "G"), -_FAR),
}


def _moved(key: str, place: int, up: int) -> int:
    return place + up * _MOVES.get(key, 0)


def draw(
    screen: Screen, look: Look, problem: str | None, worker_log: Sequence[str], width: int, height: int
) -> list[Text]:
    """The lines of the screen, at most `height` of at most `width` cells.

    Args:
        screen: what is chosen; how far back a log can be scrolled is put right in it.
        look: the run at one moment.
        problem: why it cannot be read just now.
        worker_log: lines of the selected block's worker, for the page that shows them.
        width: cells of a line.
        height: lines.
    """
    head = head_lines(look)
    if screen.held:
        head[0].append("  held", style="reverse")
    wrong = [] if problem is None else [Text(plain(f"cannot be read just now: {problem}"), style="bold red")]
    keys = "q leave  ? help  p go on" if screen.held else "q leave  ? help  p hold"
    if screen.page is Page.LOG:
        body = _log(screen, look, worker_log, width, height - len(wrong) - 1)
        lines, keys = [*wrong, *body], f"{keys}  Esc back  arrows scroll"
    elif screen.page is Page.HELP:
        lines, keys = [*head, Text(), *map(Text, HELP.splitlines())], "? or Esc back  q leave"
    else:
        order = f"{screen.order}{' reversed' if screen.reverse else ''}"
        keys = f"{keys}  s sort ({order})  r reverse  arrows select  Enter log"
        lines = _table(screen, look, [*head, *wrong], width, height - 1)
    lines = [*lines[: height - 1], Text(keys, style="dim")]
    return [cropped(line, width, look.glyphs) for line in lines]


def _table(screen: Screen, look: Look, head: list[Text], width: int, height: int) -> list[Text]:
    view = look.view
    # On a terminal of few lines the blocks matter most.
    head = head[: max(height - 2, 0)]
    bad = [Text(line, style="yellow") for line in troubles(view, look.now)]
    if len(bad) > _TROUBLES:
        bad[_TROUBLES - 1 :] = [Text(f"and {len(bad) - _TROUBLES + 1} more troubles", style="yellow")]
    room = height - len(head) - 1
    foot = min(len(bad) + 3, room // 3) if height >= _ROOMY else 0
    blocks = screen.sorted(view)
    shown = min(len(blocks), room - foot - 1 if foot else room)
    place = next((i for i, block in enumerate(blocks) if block is screen.block(view)), 0)
    top = min(max(place - shown // 2, 0), len(blocks) - shown)
    mark = look.glyphs.marker + " "
    titles, rows = table_lines(blocks, look, width - len(mark))
    lines = [*head, Text("  ", style="underline").append_text(titles)]
    for block, row in list(zip(blocks, rows, strict=True))[top : top + shown]:
        chosen = block is screen.block(view)
        lines.append(Text(mark if chosen else "  ", style="bold" if chosen else "").append_text(row))
    spare = height - len(lines) - 1
    if spare > 0:
        more = "" if shown == len(blocks) else f"blocks {top + 1} to {top + shown} of {len(blocks)}"
        newest = view.notices[-max(min(spare - len(bad), _NOTICES), 0) :] if spare > len(bad) else []
        lines += [Text(more, style="dim"), *bad, *(notice_line(notice, look.now) for notice in newest)]
    return lines


def _log(screen: Screen, look: Look, worker_log: Sequence[str], width: int, height: int) -> list[Text]:
    head, lines = page_lines(look, screen.block(look.view), worker_log, width)
    room = max(height - len(head), 1)
    screen.back = min(screen.back, max(len(lines) - room, 0))
    end = len(lines) - screen.back
    return [*head, *lines[max(end - room, 0) : end]]
