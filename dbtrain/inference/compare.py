"""A run beside its end-to-end baseline: quality, size, memory of a worker, work done, time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dbtrain.errors import UserError
from dbtrain.inference.evaluate import Evaluation
from dbtrain.run_directory import RunDirectory


@dataclass(frozen=True)
class Side:
    """One of the two."""

    run: str
    accuracy: float
    """Of the read-out that `predict` uses."""
    best: float
    """Of the best read-out; chosen on the split it is measured on."""
    best_readout: str
    parameters: int
    largest_worker_bytes: int
    """Planned bytes of the largest block's worker: weights, gradients, optimiser, averages, activations."""
    layer_evaluations: int
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
    ours, theirs = run.plan.data, baseline.plan.data
    if ours is None or theirs is None or ours.sha256 != theirs.sha256:
        raise UserError("was trained on other data than the run", field="BASELINE", value=baseline.uri)


def side(run: RunDirectory, evaluation: Evaluation) -> Side:
    """What there is to say of one run."""
    best = max(evaluation.readouts, key=lambda name: evaluation.readouts[name])
    wall, work = _seconds(run.events())
    return Side(
        run=run.uri,
        accuracy=evaluation.readouts[evaluation.predict],
        best=evaluation.readouts[best],
        best_readout=best,
        parameters=sum(block.parameters for block in run.plan.blocks),
        largest_worker_bytes=max(block.bytes.total for block in run.plan.blocks),
        layer_evaluations=run.plan.layer_evaluations,
        wall_seconds=wall,
        worker_seconds=work,
    )


def compare(run: RunDirectory, ours: Evaluation, baseline: RunDirectory, theirs: Evaluation) -> dict[str, Any]:
    """Both sides as plain data, under `run` and `baseline`.

    Raises:
        UserError: the two do not go together.
    """
    check_baseline(run, baseline)
    return {"run": asdict(side(run, ours)), "baseline": asdict(side(baseline, theirs))}


def _seconds(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Wall time of the run and time of its workers, from the journal: all starts together."""
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
        elif "block" in event and event["block"] in workers:
            work += time - workers.pop(event["block"])
        last = time
    if run_since is not None:  # the last driver died, or is at work
        wall += last - run_since
        work += sum(last - since for since in workers.values())
    return wall, work
