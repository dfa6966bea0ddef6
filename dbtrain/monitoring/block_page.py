"""One block's page of the monitor: what the journal says of it, its newest metrics, its worker's log."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import chop_cells
from rich.text import Text

from dbtrain.monitoring.columns import Look, layers_text, loss_text, memory_text, si_text
from dbtrain.monitoring.overview import clock, notice_line
from dbtrain.monitoring.plain_text import plain
from dbtrain.monitoring.run_view import BlockView, RunView
from dbtrain.monitoring.sparkline import sparkline
from dbtrain.monitoring.terminal import STATE_STYLES, noise_text

LOG_BYTES = 64 << 10
"""What is shown of the end of a worker's log."""
METRICS = 10
"""Lines of metrics that are shown."""
NOTICES = 200
"""Lines of the journal that are shown."""
_SHOWN = ("loss", "grad_norm", "lr", "samples_per_second")
# Ray's own marks, which tell nothing here.
_MARKS = (":job_id:", ":actor_name:", ":task_name:")


def page_lines(look: Look, block: BlockView, worker_log: Sequence[str], width: int) -> tuple[list[Text], list[Text]]:
    """What stays at the top, and what is scrolled below it, oldest first; lines are wrapped to `width` cells."""
    where = f"process {block.pid} on {block.node}, {block.device}" if block.pid is not None else "no worker"
    head = [
        Text.assemble(
            (f"block {block.index}", "bold"),
            f"  layers {layers_text(block)}  noise {noise_text(block.layout)}  ",
            (str(block.state), STATE_STYLES[block.state]),
            f" at step {block.step} of {block.total}, attempt {block.attempt}",
        ),
        Text(plain(f"{where}, peak memory {memory_text(block)}, checkpoint of step {block.checkpoint_step}")),
        Text(sparkline(block.losses.thinned(width)[1], look.glyphs), style="cyan"),
    ]
    lines = [_title("journal")]
    lines += [
        wrapped
        for notice in look.view.notices
        if notice.block == block.index
        for wrapped in _wrapped(notice_line(notice, look.now).plain, width)
    ][-NOTICES:]
    lines += [_title("metrics")]
    lines += [Text(_metrics(line, look.now)) for line in block.recent[-METRICS:]]
    lines += [_title("worker")]
    lines += [wrapped for line in worker_log for wrapped in _wrapped(plain(line), width)]
    return head, lines


def worker_log(view: RunView, block: BlockView) -> list[str]:
    """The end of what the block's newest worker wrote, or why it cannot be shown. Any text may be in it."""
    if block.pid is None:
        return ["no worker in this start of the run"]
    if view.backend == "inline":
        return ["trains in the driver's own process, which keeps no log"]
    if view.worker_logs is None:
        return ["the cluster, which the run has joined, keeps the workers' logs: see its dashboard"]
    try:
        # What the standard output of process 71 says is in worker-...-71.out.
        paths = [path for end in ("out", "err") for path in Path(view.worker_logs).glob(f"worker-*-{block.pid}.{end}")]
        lines = []
        for path in paths:
            lines += [f"{path}:", *_end_of(path)]
    except (OSError, ValueError) as error:  # the latter of names that no file has
        return [f"{view.worker_logs} cannot be read: {error}"]
    if not lines:
        return [f"{view.worker_logs} on the driver's machine; it is not there, or has nothing of process {block.pid}"]
    return lines


def _end_of(path: Path) -> list[str]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LOG_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()
    if size > LOG_BYTES:
        lines[:1] = [f"(the last {LOG_BYTES >> 10} KiB)"]  # in place of one that is cut
    return [line for line in lines if not line.startswith(_MARKS)]


def _metrics(line: dict[str, Any], now: float) -> str:
    when = clock(float(line["time"]), now)
    if "event" in line:
        return plain(f"{when} {line['event']} to step {line.get('step')}: {line.get('reason')}")
    values = {name: math.nan if line[name] is None else float(line[name]) for name in _SHOWN}
    return (
        f"{when} step {int(line['step'])}  loss {loss_text(values['loss'])}  gradient {values['grad_norm']:.3g}  "
        f"lr {values['lr']:.3g}  {si_text(values['samples_per_second'])} samples/s"
    )


def _title(name: str) -> Text:
    return Text(f"-- {name} --", style="dim")


def _wrapped(line: str, width: int) -> list[Text]:
    return [Text(piece) for piece in chop_cells(line, max(width, 2))] or [Text()]
