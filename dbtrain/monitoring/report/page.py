"""The report as HTML: one file with its style and its pictures inside, nothing loaded and no script."""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

import dbtrain
from dbtrain.monitoring.plain_text import without_keys
from dbtrain.monitoring.report import charts, tables
from dbtrain.monitoring.report.faults import survived
from dbtrain.monitoring.report.gather import Report, Side
from dbtrain.plan import BlockPlan, human_bytes

_UNSHOWN = {code: "\N{REPLACEMENT CHARACTER}" for code in range(32) if chr(code) not in "\n\t"}
"""Control characters, which HTML does not know; workers may write them."""


@dataclass(frozen=True)
class Tile:
    """One figure at the top."""

    name: str
    value: str
    note: str = ""


def render(report: Report) -> bytes:
    """The page, UTF-8. Whatever comes from the run is text in it, and stays text."""
    folder = files("dbtrain.monitoring.report")
    css = folder.joinpath("report.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["coded"] = _coded
    environment.globals |= {"tables": tables, "charts": charts, "version": dbtrain.__version__}
    workers = _workers(report)
    page: str = environment.from_string(folder.joinpath("report.html").read_text(encoding="utf-8")).render(
        report=report,
        ours=report.ours,
        theirs=report.theirs,
        css=Markup(css),
        # The style in this file is the one that a browser may use: a style in a run's name is not.
        style_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        tiles=_tiles(report),
        losses=_losses(report),
        bars=charts.memory(workers),
        parts=[(n, name) for n, name in enumerate(charts.PARTS) if any(getattr(b.bytes, name) for _, b in workers)],
        commands=_commands(report),
        png=_data_uri(report),
    )
    # Keys in an address are nobody's business who reads the page.
    page = without_keys(page)
    # A worker's reason may hold half a surrogate pair, which UTF-8 cannot.
    return page.translate(_UNSHOWN).encode("utf-8", "replace")


def _coded(text: str) -> Markup:
    """What stands between backticks in type of its own."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one of them has no other
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def _tiles(report: Report) -> list[Tile]:
    ours, theirs, whole = report.ours, report.theirs, report.whole
    # Rounded down: all of them is said of all alone.
    found = [Tile("state", str(ours.view.state), f"{math.floor(100 * ours.view.fraction)}% of the steps")]
    if ours.evaluation is not None:
        note = f"{ours.evaluation.split}, {ours.evaluation.metric.better} is better"
        if theirs is not None and theirs.evaluation is not None:
            note = f"end to end: {theirs.evaluation.metric.show(theirs.evaluation.value)}"
        found.append(Tile(ours.evaluation.metric.title, ours.evaluation.metric.show(ours.evaluation.value), note))
    size = tables.largest(ours)
    share = "" if whole is None else f"{size / whole.bytes.total:.0%} of end to end"
    found += [
        Tile("memory of a worker, planned", human_bytes(size), share),
        Tile("parameters", f"{sum(block.parameters for block in ours.run.plan.blocks):,}", tables.what(ours)),
        Tile("time", tables.elapsed(ours), f"{ours.view.starts} start{'' if ours.view.starts == 1 else 's'}"),
        Tile("disturbances survived", str(survived(ours.faults))),
    ]
    return found


def _losses(report: Report) -> list[tuple[str, Markup]]:
    """A title and a plot each: all blocks, every block, the baseline."""
    view = report.ours.view
    count = len(view.blocks)
    found = []
    if count > 1 and (plot := charts.all_losses(view)) is not None:
        found.append(("all blocks", plot))
    for block in view.blocks:
        if (plot := charts.block_loss(block, charts.colour(block.index, count))) is not None:
            found.append((charts.block_name(block.layout), plot))
    if report.theirs is not None:
        [whole] = report.theirs.view.blocks
        if (plot := charts.block_loss(whole, charts.BASELINE)) is not None:
            found.append(("baseline, end to end", plot))
    return found


def _workers(report: Report) -> list[tuple[str, BlockPlan]]:
    rows = [(charts.block_name(block), block) for block in report.ours.run.plan.blocks]
    return rows if report.whole is None else [*rows, ("end to end", report.whole)]


def _commands(report: Report) -> list[str]:
    """What makes the same runs again, beside the old ones."""
    again = f"{report.ours.run.config.name}-again"
    lines = [_train(report.ours, again), f"dbtrain assemble {again}"]
    if report.theirs is not None:
        beside = f"{again}-baseline"
        lines += [_train(report.theirs, beside), f"dbtrain evaluate {again} --baseline {beside}"]
        return [*lines, f"dbtrain report {again} {beside}"]
    return [*lines, f"dbtrain evaluate {again}", f"dbtrain report {again}"]


def _train(side: Side, where: str) -> str:
    verb = "train" if side.run.plan.kind == "blocks" else "baseline"
    backend = side.view.backend if side.view.backend in ("ray", "inline") else "ray"
    config = f"{side.run.uri}/config.yaml" if side.run.storage.local_path is not None else "config.yaml"
    return f"dbtrain {verb} {shlex.quote(config)} --run {where} --backend {backend}"


def _data_uri(report: Report) -> str | None:
    if report.samples is None or report.samples.png is None:
        return None
    return f"data:image/png;base64,{base64.b64encode(report.samples.png).decode()}"
