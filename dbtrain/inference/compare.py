"""A run beside its end-to-end baseline: quality, size, memory of a worker, work done, time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dbtrain.errors import UserError
from dbtrain.inference.evaluation import Evaluation
from dbtrain.run_directory import RunDirectory

_TRAINS_ON = {"block_rolled_back", "block_waiting", "block_slow", "block_scaled", "block_leaving"}
"""What the journal tells of a block whose worker does not end with that."""


@dataclass(frozen=True)
class Side:
    """One of the two."""

    run: str
    value: float
    """The metric, of the read-out in use."""
    best: float
    """Of the best read-out; chosen on the split it is measured on."""
    best_readout: str
    parameters: int
    largest_worker_bytes: int
    """Planned bytes of the largest block's worker: weights, gradients, optimiser, averages, activations."""
    layer_evaluations: int
    flops: float
    """Floating-point operations of the whole training, forward and backward."""
    wall_seconds: float
    """From the journal: time in which the run was driven, all starts together."""
    worker_seconds: float
    """The same, summed over workers."""


def check_baseline(run: RunDirectory, baseline: RunDirectory) -> None:
    """Whether the two can stand beside each other.

    Raises:
        UserError: `baseline` is no end-to-end run, or they were not trained on the same data.
    """
    if baseline.plan.kind != "end_to_end":
        swapped = run.plan.kind == "end_to_end"
        mend = "swap the two: the run of blocks comes first" if swapped else "give one of `dbtrain baseline`"
        raise UserError("is no end-to-end run", field="BASELINE", value=baseline.uri, mend=mend)
    if run.config.model.family != baseline.config.model.family:
        raise UserError(
            f"is of the family {baseline.config.model.family}, the run of {run.config.model.family}",
            field="BASELINE",
            value=baseline.uri,
            mend="give the baseline of the same configuration",
        )
    ours, theirs = run.plan.data, baseline.plan.data
    if ours is None or theirs is None or ours.sha256 != theirs.sha256:
        raise UserError("was trained on other data than the run", field="BASELINE", value=baseline.uri)


def side(run: RunDirectory, evaluation: Evaluation) -> Side:
    """What there is to say of one run."""
    wall, work = driven_seconds(run.events())
    return Side(
        run=run.uri,
        value=evaluation.value,
        best=evaluation.readouts[evaluation.best],
        best_readout=evaluation.best,
        parameters=sum(block.parameters for block in run.plan.blocks),
        largest_worker_bytes=max(block.bytes.total for block in run.plan.blocks),
        layer_evaluations=run.plan.layer_evaluations,
        flops=float(run.plan.flops),
        wall_seconds=wall,
        worker_seconds=work,
    )


def compare(run: RunDirectory, ours: Evaluation, baseline: RunDirectory, theirs: Evaluation) -> dict[str, Any]:
    """Both sides as plain data, under `run` and `baseline`, and the metric.

    Raises:
        UserError: the two do not go together.
    """
    check_baseline(run, baseline)
    return {"metric": asdict(ours.metric), "run": asdict(side(run, ours)), "baseline": asdict(side(baseline, theirs))}


def driven_seconds(events: list[dict[str, Any]], heard_at: float | None = None) -> tuple[float, float]:
    """Wall time of the run and time of its workers, from the journal: all starts together.

    A driver that is at work, or died, counts until its last line, or until `heard_at` (seconds since 1970) where
    something else of the run is newer.
    """
    wall = work = last = 0.0
    run_since: float | None = None
    workers: dict[int, float] = {}
    for event in events:
        time, kind = float(event["time"]), str(event["event"])
        if kind == "run_started":
            if run_since is not None:  # the driver before died without a word
                wall += last - run_since
                work += sum(last - since for since in workers.values())
                workers.clear()
            run_since = time
        elif kind in ("run_ended", "run_interrupted"):
            wall += time - (time if run_since is None else run_since)
            work += sum(time - since for since in workers.values())
            run_since = None
            workers.clear()
        elif kind == "block_running":
            workers[event["block"]] = time
        elif kind not in _TRAINS_ON and event.get("block") in workers:
            work += time - workers.pop(event["block"])
        last = time
    if run_since is not None:  # the last driver died, or is at work
        last = max(last, heard_at or last)
        wall += last - run_since
        work += sum(last - since for since in workers.values())
    return wall, work
