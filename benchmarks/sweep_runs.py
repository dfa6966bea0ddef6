"""The runs of a sweep as Ray tasks, one core each; the runs that a tuned row reports wait for its value."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from quality import RunFailed, figures_of, train_one
from sweep_file import Job, RowJobs

from dbtrain.errors import UserError
from dbtrain.inference.evaluation import Metric
from dbtrain.inference.runs import evaluation_of
from dbtrain.orchestration.lock import driver_at_work
from dbtrain.storage import Storage

_ORPHAN_SECONDS = 60.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What a finished run says."""

    metric: Metric
    predict: str
    """Name of the figure that counts: the read-out in use."""
    figures: dict[str, float]
    layer_evaluations: int
    flops: int
    seconds: float
    """Of this call: few, where the run was there already."""

    @property
    def value(self) -> float:
        """The figure that counts."""
        return self.figures[self.predict]


@dataclass(frozen=True)
class Failed:
    """A run that gave no figures."""

    reason: str
    seconds: float
    trace: str = ""
    """Of an exception that nobody foresaw."""


Outcome = Measured | Failed


@dataclass
class RowOutcome:
    """What has come of a row so far."""

    jobs: RowJobs
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """Of its runs, by their folders."""
    value: str | None = None
    """The chosen one of a tuned row, as YAML."""

    @property
    def reported(self) -> Sequence[Job]:
        """The runs that its line of the table stands on; none as long as its value is not chosen."""
        return self.jobs.reported.get(self.value, ())

    @property
    def measured(self) -> list[Measured]:
        """What they say, in the order of the seeds, without those that failed."""
        found = [self.outcomes.get(job.folder) for job in self.reported]
        return [one for one in found if isinstance(one, Measured)]

    @property
    def failures(self) -> list[str]:
        """One clause for each run that failed."""
        found = [(job, self.outcomes.get(job.folder)) for job in [*self.jobs.tuning, *self.reported]]
        said = [f"{describe(job)}: {one.reason}" for job, one in found if isinstance(one, Failed)]
        return said if self.reported else [*said, "no value was left to choose"]

    def means(self) -> dict[str, float]:
        """The mean over the tuning seeds by value, for those values whose runs all gave a number."""
        by_value: dict[str, list[float]] = {}
        for job in self.jobs.tuning:
            assert job.value is not None
            one = self.outcomes.get(job.folder)
            by_value.setdefault(job.value, []).append(one.value if isinstance(one, Measured) else math.nan)
        means = {value: statistics.fmean(figures) for value, figures in by_value.items()}
        return {value: mean for value, mean in means.items() if math.isfinite(mean)}

    def choose(self) -> None:
        """Take the value with the best mean; the first one of equals."""
        means = self.means()
        if means:
            one = next(o for job in self.jobs.tuning if isinstance(o := self.outcomes[job.folder], Measured))
            better = max if one.metric.better == "higher" else min
            self.value = better(means, key=lambda value: means[value])


def describe(job: Job) -> str:
    """Which of its row's runs it is."""
    return f"seed {job.seed}" if job.value is None else f"{job.value}, seed {job.seed}"


def measure(job: Job, folder: Path) -> Outcome:
    """Train the run in `folder` and evaluate it, as far as that is not done; nothing that goes wrong is raised."""
    began = time.monotonic()
    try:
        # The worker of a sweep that was killed may live for a moment longer.
        while driver_at_work(Storage.open(folder)) and time.monotonic() - began < _ORPHAN_SECONDS:
            time.sleep(0.2)
        run = train_one(job.config, job.kind, folder)
        evaluation = evaluation_of(run, device=job.config.resources.resolved_device)
    except (RunFailed, UserError) as error:
        return Failed(str(error), time.monotonic() - began)
    except Exception as error:
        # A bug, or the machine: the other runs go on.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Failed(reason, time.monotonic() - began, traceback.format_exc())
    return Measured(
        evaluation.metric,
        evaluation.predict,
        figures_of(evaluation),
        run.plan.layer_evaluations,
        run.plan.flops,
        time.monotonic() - began,
    )


def run_all(rows: Sequence[RowJobs], folder: Path, say: Say) -> list[RowOutcome]:
    """Every run of every row, in run directories below `folder`, on the Ray cluster that this process is connected to.

    Args:
        rows: from `sweep_file.expand`.
        folder: an absolute path that all nodes see.
        say: gets a line for every run that is over.

    Raises:
        UserError: a run wants more GPUs than the cluster has, and would wait for ever.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    have = resources.get("GPU", 0.0)
    for job in (job for row in rows for reported in row.reported.values() for job in reported):
        if job.config.resources.gpus > have:
            raise UserError(
                f"asks for more GPUs than the {have:g} of the Ray cluster",
                field=f"row {job.row!r}: resources.gpus",
                value=job.config.resources.gpus,
            )
    outcomes = {jobs.row.name: RowOutcome(jobs) for jobs in rows}
    total = sum(len(jobs.tuning) + len(next(iter(jobs.reported.values()))) for jobs in rows)
    done = 0
    waiting: dict[Any, Job] = {}
    task = ray.remote(measure)

    def submit(jobs: Sequence[Job]) -> None:
        for job in jobs:
            sized = task.options(num_cpus=1, num_gpus=job.config.resources.gpus)
            waiting[sized.remote(job, folder / job.folder)] = job

    # Rows that wait for their value first: the others fill the cores in the meantime.
    for jobs in rows:
        submit(jobs.tuning)
    for jobs in rows:
        submit(jobs.reported.get(None, ()))
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(ready[0])
        row, outcome = outcomes[job.row], _result(ready[0])
        row.outcomes[job.folder] = outcome
        done += 1
        say(_line(f"{done}/{total}", job, outcome))
        if isinstance(outcome, Failed) and outcome.trace:
            say(outcome.trace)
        if job in row.jobs.tuning and all(other.folder in row.outcomes for other in row.jobs.tuning):
            row.choose()
            if row.value is None:
                total -= len(next(iter(row.jobs.reported.values())))
                say(f"{job.row}: no value was left to choose")
            else:
                say(f"{job.row}: {row.value} is chosen of {_numbers(row.means())}")
                submit(row.reported)
    return list(outcomes.values())


def _result(task: Any) -> Outcome:
    """A worker may also die, of too little memory for instance; Ray has tried again by then."""
    try:
        outcome: Outcome = ray.get(task)
        return outcome
    except ray.exceptions.RayError as error:
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 0.0)


def _line(count: str, job: Job, outcome: Outcome) -> str:
    if isinstance(outcome, Failed):
        said = f"FAILED: {outcome.reason}"
    else:
        said = f"{outcome.predict} {outcome.metric.show(outcome.value)}"
    return f"[{count}] {job.row}, {describe(job)}: {said} ({outcome.seconds:.1f} s)"


def _numbers(means: Mapping[str, float]) -> str:
    return ", ".join(f"{value}: {mean:.4g}" for value, mean in means.items())
