"""From run directories to what their report says, as plain data; nothing is trained, evaluated or written."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any

from dbtrain.errors import UserError
from dbtrain.inference.compare import check_baseline, driven_seconds
from dbtrain.inference.evaluation import Evaluation, Point
from dbtrain.inference.runs import evaluation_known
from dbtrain.models import family_of
from dbtrain.monitoring.lines import LineFollower
from dbtrain.monitoring.report.faults import BlockLines, Fault, faults, is_event, told
from dbtrain.monitoring.report.samples import Samples, samples_kept
from dbtrain.monitoring.report.settings import Setting, settings
from dbtrain.monitoring.run_view import RunReader, RunView
from dbtrain.plan import BlockPlan
from dbtrain.run_directory import EVALUATION, EVENTS, METRICS, WORKERS, RunDirectory
from dbtrain.training.planner import make_plan

_OF_AN_ATTEMPT = frozenset({"time", "attempt", "step", "replicas", "machine"})
"""What a worker's line says beside the kind of its machine."""


@dataclass(frozen=True)
class Model:
    """The assembled model, as its own config.json describes it."""

    sha256: str
    weights: str
    """ema or raw."""
    steps: tuple[int, ...]
    """Of each block."""


@dataclass(frozen=True)
class Machine:
    """A kind of machine that trained, with the software on it."""

    names: tuple[str, ...]
    """Of those that are alike."""
    facts: dict[str, Any]
    """As `dbtrain.training.machine.machine_facts` tells them, without the name."""
    blocks: tuple[int, ...]
    attempts: int


@dataclass(frozen=True)
class Side:
    """What there is to say of one run."""

    run: RunDirectory
    view: RunView
    model: Model | None
    evaluation: Evaluation | None
    machines: tuple[Machine, ...]
    faults: tuple[Fault, ...]
    wall_seconds: float
    """In which the run was driven, all starts together."""
    worker_seconds: float
    """The same, summed over workers."""
    peaks: tuple[int | None, ...]
    """Bytes that each block's worker has held at once, at most, in any attempt; None where none was told."""
    missing: tuple[str, ...]
    """What the report lacks, and what would mend that."""


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    ours: Side
    theirs: Side | None
    settings: tuple[Setting, ...]
    whole: BlockPlan | None
    """The network end to end as it is planned, for a run of blocks; None where it cannot be planned any more."""
    samples: Samples | None
    draws: bool
    """Whether the model makes images or texts."""
    made_at: float
    """Seconds since 1970."""


def gather(run: RunDirectory, baseline: RunDirectory | None = None, samples: Samples | None = None) -> Report:
    """Read what is there.

    Args:
        baseline: the end-to-end run to stand beside it.
        samples: what to show instead of those that lie in the run directory.

    Raises:
        UserError: the two runs do not go together, or a directory cannot be read.
    """
    if baseline is not None:
        check_baseline(run, baseline)
    ours = _side(run)
    return Report(
        ours=ours,
        theirs=None if baseline is None else _comparable(ours, _side(baseline)),
        settings=tuple(settings(run.config)),
        whole=_whole(run, baseline),
        samples=samples_kept(run) if samples is None else samples,
        draws=family_of(run.config).task != "classify",
        made_at=time.time(),
    )


def _side(run: RunDirectory) -> Side:
    try:
        view = RunReader(run).read()
        blocks = [_lines(run, block.index) for block in run.plan.blocks]
        journal = [line for line in LineFollower(run.storage, EVENTS).read() if is_event(line, len(blocks))]
        finished = all(block.step == block.total for block in view.blocks)
        model, evaluation, missing = _results(run, finished)
    except OSError as error:
        raise UserError(f"cannot be read: {error}", field="RUN", value=run.uri) from None
    wall, work = driven_seconds(journal, view.heard_at)
    if not any(block.losses.steps for block in view.blocks):
        missing = ("Nothing was measured yet: there are no losses to draw.", *missing)
    if not finished:
        missing = (f"The run is {view.state}; this is what it has reached.", *missing)
    return Side(
        run=run,
        view=view,
        model=model,
        evaluation=evaluation,
        machines=_machines(blocks),
        faults=tuple(faults(journal, blocks)),
        wall_seconds=wall,
        worker_seconds=work,
        peaks=tuple(_peak(own) for own in blocks),
        missing=missing,
    )


def _comparable(ours: Side, theirs: Side) -> Side:
    """The baseline without figures that were measured on something else."""
    mine, other = ours.evaluation, theirs.evaluation
    if mine is None or other is None or (mine.metric, mine.split) == (other.metric, other.split):
        return theirs
    why = f"It was evaluated on {other.split}, the run on {mine.split}: its figures are left out."
    return replace(theirs, evaluation=None, missing=(*theirs.missing, why))


def _lines(run: RunDirectory, index: int) -> BlockLines:
    storage = run.block(index).storage
    return BlockLines(
        told(LineFollower(storage, METRICS).read()),
        told(LineFollower(storage, WORKERS).read()),
    )


def _peak(own: BlockLines) -> int | None:
    peaks = [line["peak_memory"] for line in own.metrics if isinstance(line.get("peak_memory"), int)]
    return max(peaks, default=None)


def _machines(blocks: list[BlockLines]) -> tuple[Machine, ...]:
    """One for each kind of facts that workers told, in the order in which they trained."""
    lines = [(line["time"], index, line) for index, own in enumerate(blocks) for line in own.workers]
    found: dict[str, tuple[dict[str, Any], list[str], list[int]]] = {}
    for _, index, line in sorted(lines, key=lambda entry: entry[0]):
        facts = {key: value for key, value in line.items() if key not in _OF_AN_ATTEMPT}
        _, names, blocks_there = found.setdefault(json.dumps(facts, sort_keys=True), (facts, [], []))
        names.append(str(line.get("machine") or "-"))
        blocks_there.append(index)
    return tuple(
        Machine(tuple(dict.fromkeys(names)), facts, tuple(sorted(set(blocks_there))), len(blocks_there))
        for facts, names, blocks_there in found.values()
    )


def _results(run: RunDirectory, finished: bool) -> tuple[Model | None, Evaluation | None, tuple[str, ...]]:
    """The model and its evaluation, and a sentence for what is missing."""
    evaluate = f"`dbtrain evaluate {run.uri}` adds them."
    if not finished:
        evaluate = f"`dbtrain assemble --partial {run.uri}` and `dbtrain evaluate {run.uri}` add them."
    if not run.storage.exists("model/model.safetensors"):
        return None, None, (f"The blocks are not assembled: there are no figures of quality. {evaluate}",)
    model = _model(run)
    if model is None:
        again = f"`dbtrain assemble {run.uri}` makes it anew."
        return None, None, (f"The assembled model's config.json cannot be read. {again}",)
    missing: tuple[str, ...] = ()
    if min(model.steps) < run.plan.steps:
        missing = (f"The model was assembled from blocks at steps {', '.join(map(str, model.steps))}.",)
    evaluation = evaluation_known(run, model.sha256)
    if evaluation is None or not _is_sound(evaluation):
        why = (
            "The evaluation that is there is of another model, or from an earlier version of dbtrain"
            if run.storage.exists(EVALUATION)
            else "Nothing was evaluated"
        )
        return model, None, (*missing, f"{why}: there are no figures of quality. {evaluate}")
    return model, evaluation, missing


def _model(run: RunDirectory) -> Model | None:
    try:
        about = json.loads(run.storage.read_bytes("model/config.json"))
        steps = tuple(int(step) for step in about.get("steps", [run.plan.steps]))
        return Model(str(about["sha256"]), str(about["weights"]), steps) if steps else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_sound(evaluation: Evaluation) -> bool:
    """Whether all that is drawn and shown is there: the file may have been edited."""
    metric = evaluation.metric.name

    def told_of(point: Point) -> bool:
        return isinstance(point, dict) and {"block", metric} <= point.keys() and all(map(_is_number, point.values()))

    figures = [*evaluation.readouts.values(), *evaluation.also.values(), *evaluation.calibration.values()]
    in_use = evaluation.predict in evaluation.readouts
    return in_use and all(map(_is_number, figures)) and all(map(told_of, (*evaluation.chain, *evaluation.alone)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(run: RunDirectory, baseline: RunDirectory | None) -> BlockPlan | None:
    """The end-to-end network's plan: the baseline's own, or what it would be."""
    if run.plan.kind == "end_to_end":
        return None
    if baseline is not None:
        return baseline.plan.blocks[0]
    try:
        return make_plan(run.config, "end_to_end", run.plan.data).blocks[0]
    except UserError:  # such as a pretrained model that has gone since
        return None
