"""The run on standard error: a live table on a terminal, one line for every change of state elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dbtrain.orchestration.driver import Snapshot, Watcher
from dbtrain.orchestration.state import BlockState, BlockStatus
from dbtrain.plan import BlockPlan

STATE_STYLES = {
    BlockState.PENDING: "dim",
    BlockState.STARTING: "cyan",
    BlockState.RUNNING: "bold",
    BlockState.PAUSED: "dim",
    BlockState.RESTARTING: "yellow",
    BlockState.FINISHED: "green",
    BlockState.FAILED: "bold red",
    BlockState.STOPPED: "yellow",
}
_REDRAWS_PER_SECOND = 4


@contextmanager
def watch_terminal(console: Console | None = None) -> Iterator[Watcher]:
    """A watcher for `train_run`: a live table if standard error is a terminal, else a line per change of
    state.

    Other output of the process appears above the table while it is shown.
    """
    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        yield LineWatcher(console)
        return
    table = TableWatcher()
    with Live(table, console=console, refresh_per_second=_REDRAWS_PER_SECOND):
        yield table


class TableWatcher:
    """Keeps the newest state; `Live` asks for the table when it is due to be drawn."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None

    def update(self, snapshot: Snapshot) -> None:
        """Take over the newest state."""
        self._snapshot = snapshot

    def __rich__(self) -> RenderableType:
        return Text("starting") if self._snapshot is None else status_table(self._snapshot)


class LineWatcher:
    """Writes one line for every change of a block's state and for every new trouble, and none for mere progress."""

    def __init__(self, console: Console):
        self._console = console
        self._seen: dict[int, tuple[BlockState, int]] = {}
        self._remarks: dict[int, list[str]] = {}

    def update(self, snapshot: Snapshot) -> None:
        """Compare with what was written last."""
        for block in snapshot.blocks:
            now = (block.state, block.attempt)
            if self._seen.get(block.index, (BlockState.PENDING, block.attempt)) != now:
                self._print(status_line(block, snapshot.plan.steps))
            self._seen[block.index] = now
            known, remarks = self._remarks.get(block.index, []), _remarks(block)
            for remark in remarks:
                if remark not in known:
                    self._print(f"block {block.index}: {remark}")
            self._remarks[block.index] = remarks

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def status_line(block: BlockStatus, total: int) -> str:
    """One block in one line: `block 1: running at step 40 of 100, attempt 2, process 71 on 10.0.0.3`."""
    parts = [
        f"block {block.index}: {block.state} at step {block.step} of {total}",
        f"attempt {block.attempt}",
    ]
    if block.pid is not None:
        parts.append(f"process {block.pid} on {block.node}")
    text = ", ".join(parts)
    # The reason of the last trouble stays with a block that was started again; once is enough.
    if block.reason is None or block.state in (BlockState.STARTING, BlockState.RUNNING):
        return text
    return f"{text}: {block.reason}"


def _remarks(block: BlockStatus) -> list[str]:
    """What is unusual about a block that has workers."""
    remarks = [remark for remark in (block.trouble, block.slow) if remark is not None]
    if block.leaving is not None:
        remarks.append(f"its workers save and leave: {block.leaving}")
    if block.rollbacks:
        times = "once" if block.rollbacks == 1 else f"{block.rollbacks} times"
        remarks.append(f"has gone back to a checkpoint {times}: values were not finite")
    return remarks


def status_table(snapshot: Snapshot) -> Table:
    """The whole run, one row a block; the reasons of trouble stand below."""
    table = Table(
        title=f"{snapshot.plan.name}  {snapshot.run}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    # On a narrow terminal the device gives way; numbers are never cut.
    for name in ("block", "layers", "noise", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("device")
    for name in ("step", "loss", "samples/s", "ETA", "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    plan = snapshot.plan
    for block in snapshot.blocks:
        layout = plan.blocks[block.index]
        running = block.state is BlockState.RUNNING
        table.add_row(
            str(block.index),
            f"{layout.layers[0]}-{layout.layers[1] - 1}",
            noise_text(layout),
            Text(str(block.state) + (f" x{block.seats}" if block.seats > 1 else ""), style=STATE_STYLES[block.state]),
            Text(
                "-" if block.pid is None else f"{block.device} @ {block.node}",
                no_wrap=True,
                overflow="ellipsis",
            ),
            f"{block.step}/{plan.steps}",
            "-" if math.isnan(block.loss) else f"{block.loss:.4f}",
            f"{block.samples_per_second:.0f}" if running and block.samples_per_second > 0 else "-",
            duration(_seconds_left(block, snapshot)) if running else "-",
            str(block.restarts),
        )
    troubles = [f"block {b.index}: {b.reason}" for b in snapshot.blocks if b.reason is not None]
    troubles += [f"block {b.index}: {remark}" for b in snapshot.blocks for remark in _remarks(b)]
    if snapshot.stopping:
        troubles.append("stopping: workers finish their step and save")
    if troubles:
        table.caption = Text("\n".join(troubles))
        table.caption_justify = "left"
    return table


def noise_text(block: BlockPlan) -> str:
    """The block's noise range, highest level first; a dash where there is none."""
    return "-" if block.noise is None else f"{block.noise.high:.3g}..{block.noise.low:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 7s, 3m 20s, 2h 5m or 4d 3h; a dash where they are not known."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // below}{small}"
    return f"{whole}s"


def _seconds_left(block: BlockStatus, snapshot: Snapshot) -> float:
    if not block.samples_per_second > 0:
        return math.inf
    return (snapshot.plan.steps - block.step) * snapshot.plan.batch_size / block.samples_per_second
