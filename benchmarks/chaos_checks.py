"""What has to hold after a disturbed run: from the raw facts to a verdict. Pure, and tested as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Step = tuple[float, int, int]
"""Time (seconds since 1970), attempt and step of one line of a block's metrics."""


@dataclass
class Fault:
    """One thing that was done to the run."""

    number: int
    kind: str
    block: int | None
    """The victim; None for the driver and for a node that had no worker."""
    time: float
    """Seconds since 1970, just before it was done."""
    attempts: dict[int, int]
    """The blocks that lose their worker by it, and which attempt of each."""
    steps: dict[int, int] = field(default_factory=dict)
    """Newest step of each of them at that moment."""
    durable: dict[int, int] = field(default_factory=dict)
    """Newest intact checkpoint of each of them after it, 0 for none."""
    damaged: int = 0
    """Checkpoints of the victim that it has damaged."""
    graceful: bool = False
    """Workers were asked to save first."""
    note: str = ""


@dataclass(frozen=True)
class Resumption:
    """A block's way from one worker to the next that made a step."""

    block: int
    before: int
    """Attempt of the worker before."""
    attempt: int
    """Attempt of the new worker."""
    highest: int
    """Highest step of the worker before."""
    resumed: int
    """Finished steps at which the new worker began."""
    time: float
    """When the new worker told its first step."""

    @property
    def lost(self) -> int:
        """Steps that had to be repeated."""
        return self.highest - self.resumed


def resumptions(block: int, steps: Sequence[Step]) -> list[Resumption]:
    """All of one block, from its metrics in the order in which they were written.

    Lines of an older attempt that come late, from a writer that did not know that it had been replaced, begin nothing.
    """
    found: list[Resumption] = []
    attempt = highest = 0
    for time, this, step in steps:
        if this > attempt:
            if attempt:
                found.append(Resumption(block, attempt, this, highest, step - 1, time))
            attempt, highest = this, step
        elif this == attempt:
            highest = step
    return found


def late_lines(steps: Sequence[Step]) -> int:
    """Lines that an older attempt wrote after a newer one had begun."""
    count = newest = 0
    for _, attempt, _ in steps:
        newest = max(newest, attempt)
        count += attempt < newest
    return count


@dataclass(frozen=True)
class Finding:
    """A resumption, the faults that explain it, and whether it cost no more than they may."""

    resumption: Resumption
    faults: tuple[int, ...]
    in_flight: bool
    """More than an interval was lost, because the newest checkpoint was still being written."""
    problem: str | None


def judge(resumption: Resumption, faults: Sequence[Fault], every: int) -> Finding:
    """Hold one resumption against the faults.

    At most `every` steps may be lost. Two exceptions: a damaged checkpoint costs one interval more; and a worker that
    died while it was writing a checkpoint goes back to the one before, and loses what it did since that snapshot on
    top, which is at most another interval, since the next snapshot waits for this one.
    """
    mine = [f for f in faults if resumption.before <= f.attempts.get(resumption.block, -1) < resumption.attempt]
    numbers = tuple(fault.number for fault in mine)
    if not mine:
        return Finding(resumption, (), False, "no fault hit this block")
    intact = min(fault.durable.get(resumption.block, 0) for fault in mine)
    if resumption.resumed < intact:
        return Finding(resumption, numbers, False, f"went back behind the intact checkpoint of step {intact}")
    if all(fault.graceful for fault in mine) and resumption.lost > 0:
        return Finding(resumption, numbers, False, "was asked to save, and lost steps")
    lost = resumption.lost - every * sum(fault.damaged for fault in mine)
    if lost <= every:
        return Finding(resumption, numbers, False, None)
    if lost <= 2 * every:
        return Finding(resumption, numbers, True, None)
    return Finding(resumption, numbers, False, f"lost {resumption.lost} steps")


@dataclass(frozen=True)
class Verdict:
    """All of it."""

    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    """Empty when everything holds."""


def verdict(
    faults: Sequence[Fault], steps: Sequence[Sequence[Step]], every: int, wanted: int, digest: str, expected: str
) -> Verdict:
    """Judge a run.

    Args:
        faults: what was done, in order.
        steps: lines of each block's metrics.
        every: checkpoint interval, steps.
        wanted: how many faults there should have been.
        digest: of the assembled model.
        expected: of that of the undisturbed run.
    """
    findings = tuple(
        judge(resumption, faults, every)
        for block, lines in enumerate(steps)
        for resumption in resumptions(block, lines)
    )
    problems = [
        f"block {f.resumption.block}, attempt {f.resumption.attempt}, from step {f.resumption.highest} back to"
        f" {f.resumption.resumed}: {f.problem}"
        for f in findings
        if f.problem is not None
    ]
    if len(faults) < wanted:
        problems.append(f"the run was over after {len(faults)} of {wanted} faults: give it more --steps")
    if digest != expected:
        problems.append(f"the digest is {digest}, that of the undisturbed run {expected}")
    return Verdict(findings, tuple(problems))
