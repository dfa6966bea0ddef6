"""The report's tables: figures with their units, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dbtrain.inference.evaluation import SO_FAR, Evaluation, Point, titles
from dbtrain.monitoring.report.charts import PARTS, block_name
from dbtrain.monitoring.report.faults import Fault
from dbtrain.monitoring.report.gather import Machine, Report, Side
from dbtrain.monitoring.report.settings import Setting
from dbtrain.monitoring.terminal import duration, noise_text
from dbtrain.plan import BlockPlan, human_bytes

NOTHING = "–"
NOT_RECORDED = "not recorded"
_REASON = 400
"""Characters of a reason, at most."""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})
    """Columns of words, which begin at the left; numbers end at the right."""
    prose: int | None = None
    """The column of whole sentences, which may be broken into lines."""

    @property
    def short(self) -> bool:
        """Whether it goes onto one printed page."""
        return len(self.rows) <= 20


def chosen(found: Sequence[Setting]) -> Table:
    """What somebody decided."""
    rows = [(s.field, s.value, NOTHING if s.default is None else s.default, s.about) for s in found if s.chosen]
    return Table(("field", "value", "default", "what it is"), tuple(rows), frozenset({0, 1, 2, 3}), 3)


def all_settings(found: Sequence[Setting]) -> Table:
    """Everything, resolved."""
    return Table(("field", "value"), tuple((s.field, s.value) for s in found), frozenset({0, 1}))


def plan(report: Report) -> Table:
    """Who trains what, and what it costs."""
    made = report.ours.run.plan
    samples = made.steps * made.batch_size
    rows = [_plan_row(block, samples * block.flops_per_sample) for block in made.blocks]
    if report.whole is not None:
        steps = made.steps if report.theirs is None else report.theirs.run.plan.steps
        size = made.batch_size if report.theirs is None else report.theirs.run.plan.batch_size
        rows.append(_plan_row(report.whole, steps * size * report.whole.flops_per_sample))
    return Table(
        ("", "layers", "noise", "trained on", "parameters", "MFLOP a sample", "FLOPs of the training"), tuple(rows)
    )


def _plan_row(block: BlockPlan, flops: float) -> tuple[str, ...]:
    trained = NOTHING if block.trained is None else f"{block.trained.high:.3g}..{block.trained.low:.3g}"
    return (
        block_name(block),
        f"{block.layers[0]}–{block.layers[1] - 1}",
        NOTHING if block.noise is None else noise_text(block),
        trained,
        f"{block.parameters:,}",
        f"{block.flops_per_sample / 1e6:,.1f}",
        f"{flops:.3g}",
    )


def progress(side: Side) -> Table:
    """Where every block stands."""
    rows = [
        (
            block_name(block.layout),
            str(block.state),
            f"{block.step:,} of {block.total:,}",
            _figure(block.loss),
            NOTHING if math.isnan(block.samples_per_second) else f"{block.samples_per_second:,.0f}",
            NOTHING if math.isnan(block.flops_per_second) else f"{block.flops_per_second / 1e9:,.2f}",
            str(block.restarts),
            str(block.rollbacks),
        )
        for block in side.view.blocks
    ]
    heads = ("", "state", "steps", "last loss", "samples/s", "GFLOP/s", "restarts", "roll-backs")
    return Table(heads, tuple(rows), frozenset({0, 1}))


def memory(report: Report) -> Table:
    """Planned bytes of a worker by part, and what was measured."""
    rows = [_memory_row(b, p) for b, p in zip(report.ours.run.plan.blocks, report.ours.peaks, strict=True)]
    if report.whole is not None:
        rows.append(_memory_row(report.whole, None if report.theirs is None else report.theirs.peaks[0]))
    parts = [part for part in PARTS if any(row[1 + PARTS.index(part)] != "0 B" for row in rows)]
    keep = [0, *(1 + PARTS.index(part) for part in parts), len(PARTS) + 1, len(PARTS) + 2]
    names = {"ema": "EMA"}
    heads = ("", *(names.get(part, part) for part in parts), "planned in all", "measured peak")
    return Table(heads, tuple(tuple(row[index] for index in keep) for row in rows))


def _memory_row(block: BlockPlan, peak: int | None) -> tuple[str, ...]:
    parts = [human_bytes(getattr(block.bytes, part)) for part in PARTS]
    measured = NOT_RECORDED if peak is None else human_bytes(peak)
    return (block_name(block), *parts, human_bytes(block.bytes.total), measured)


def read_outs(ours: Evaluation, theirs: Evaluation | None) -> Table:
    """The metric by read-out, with its calibration if that was measured."""
    rows = [
        _readout(name + (" (in use)" if name == ours.predict and len(ours.readouts) > 1 else ""), name, ours)
        for name in ours.readouts
    ]
    if theirs is not None:
        rows += [_readout(f"end to end: {name}", name, theirs) for name in theirs.readouts]
    rows += [(name.replace("_", " "), _figure(value), NOTHING) for name, value in ours.also.items()]
    heads = ("read-out", ours.metric.title, "calibration error, %")
    columns = len(heads) if ours.calibration else len(heads) - 1
    return Table(heads[:columns], tuple(row[:columns] for row in rows))


def _readout(title: str, name: str, evaluation: Evaluation) -> tuple[str, ...]:
    error = evaluation.calibration.get(name)
    return title, evaluation.metric.show(evaluation.readouts[name]), NOTHING if error is None else f"{100 * error:.2f}"


def points(found: Sequence[Point], evaluation: Evaluation) -> Table:
    """What steps or blocks say."""
    names = list(found[0])
    metric = evaluation.metric
    heads = titles(metric)
    show: dict[str, Callable[[float], str]] = {
        "block": lambda v: str(int(v)),
        metric.name: metric.show,
        SO_FAR: metric.show,
    }
    rows = tuple(tuple(show.get(name, _figure)(point.get(name, math.nan)) for name in names) for point in found)
    return Table(tuple(heads.get(name, name.replace("_", " ")) for name in names), rows, frozenset())


def beside(report: Report) -> Table:
    """What each run cost, and what came of it."""
    sides = [report.ours] + ([] if report.theirs is None else [report.theirs])

    def row(name: str, show: Callable[[Side], str]) -> tuple[str, ...]:
        return (name, *(show(side) for side in sides))

    rows = []
    first = report.ours.evaluation or (None if report.theirs is None else report.theirs.evaluation)
    if first is not None:
        title = f"{first.metric.title} on {first.split}"
        rows += [
            row(f"{title}, as used", lambda side: _metric(side, lambda e: e.value)),
            row(f"{title}, best read-out", lambda side: _metric(side, lambda e: e.readouts[e.best])),
            row("best read-out", lambda side: NOTHING if side.evaluation is None else side.evaluation.best),
        ]
    rows += [
        row("state", lambda side: str(side.view.state)),
        row("parameters", lambda side: f"{sum(b.parameters for b in side.run.plan.blocks):,}"),
        row("planned bytes of the largest worker", lambda side: human_bytes(largest(side))),
        row("layer-evaluations of the training", lambda side: f"{side.run.plan.layer_evaluations:,}"),
        row("FLOPs of the training", lambda side: f"{side.run.plan.flops:.3g}"),
        row("wall time, s", lambda side: f"{side.wall_seconds:,.1f}"),
        row("worker time, s", lambda side: f"{side.worker_seconds:,.1f}"),
    ]
    return Table(("", *(what(side) for side in sides)), tuple(rows))


def _metric(side: Side, of: Callable[[Evaluation], float]) -> str:
    return NOTHING if side.evaluation is None else side.evaluation.metric.show(of(side.evaluation))


def what(side: Side) -> str:
    """The run in two words."""
    count = len(side.run.plan.blocks)
    return "end to end" if side.run.plan.kind == "end_to_end" else f"{count} block{'' if count == 1 else 's'}"


def largest(side: Side) -> int:
    """Planned bytes of the largest worker."""
    return max(block.bytes.total for block in side.run.plan.blocks)


def disturbances(found: Sequence[Fault]) -> Table:
    """What happened and what it cost."""
    rows = [
        (
            moment(fault.time),
            fault.kind,
            NOTHING if fault.block is None else str(fault.block),
            NOTHING if fault.step is None else f"{fault.step:,}",
            NOTHING if fault.lost is None else f"{fault.lost:,}",
            NOTHING if fault.seconds is None else f"{fault.seconds:,.1f}",
            fault.reason if len(fault.reason) <= _REASON else fault.reason[:_REASON] + " …",
        )
        for fault in found
    ]
    heads = ("when, UTC", "what", "block", "at step", "steps again", "s until it trained again", "reason")
    return Table(heads, tuple(rows), frozenset({0, 1, 6}), 6)


def machines(found: Sequence[Machine]) -> Table:
    """Where and with what it was trained: a column for machines that are alike."""
    rows: list[tuple[str, ...]] = [
        ("blocks", *(", ".join(map(str, machine.blocks)) for machine in found)),
        ("attempts", *(str(machine.attempts) for machine in found)),
    ]
    for name, key, show in (
        ("device", "device", str),
        ("its memory", "device_memory", _bytes),
        ("processor", "processor", str),
        ("cores", "cores", str),
        ("memory", "memory", _bytes),
        ("system", "platform", str),
        ("Python", "python", str),
    ):
        rows.append((name, *(_told(machine.facts.get(key), show) for machine in found)))
    versions = [m.facts["versions"] if isinstance(m.facts.get("versions"), dict) else {} for m in found]
    for package in dict.fromkeys(name for each in versions for name in each):
        rows.append((str(package), *(_told(each.get(package), str) for each in versions)))
    names = (", ".join(machine.names) for machine in found)
    return Table(("machine", *names), tuple(rows), frozenset(range(len(found) + 1)))


def digests(side: Side) -> Table:
    """What has to be the same for the same weights to come out."""
    made, threads = side.run.plan, side.run.plan.threads
    rows = [
        ("configuration, SHA-256", made.config_sha256),
        ("data, SHA-256", NOT_RECORDED if made.data is None else made.data.sha256),
        ("codebook, SHA-256", made.codebook_sha256 or "has none"),
        ("seed", str(made.seed)),
        ("threads of each worker", str(threads)),
        ("kind of device", side.run.config.resources.resolved_device),
        ("weights, SHA-256", "not assembled" if side.model is None else side.model.sha256),
        ("which weights", NOTHING if side.model is None else side.model.weights),
    ]
    return Table(("", what(side)), tuple(rows), frozenset({0, 1}))


def moment(seconds: float) -> str:
    """A time, of seconds since 1970."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # of a journal that somebody has edited
        return NOTHING


def _told(value: Any, show: Callable[[Any], str]) -> str:
    return NOT_RECORDED if value is None else show(value)


def _bytes(value: Any) -> str:
    return human_bytes(value) if isinstance(value, int | float) else str(value)


def _figure(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.4g}"


def elapsed(side: Side) -> str:
    """Time in which the run was driven."""
    return duration(side.wall_seconds)
