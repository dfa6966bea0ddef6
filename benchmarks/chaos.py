"""A run that is killed in every way there is, and ends with the bytes of an undisturbed one.

    python benchmarks/chaos.py --faults 30 --seed 7

Four small blocks train on a local Ray cluster of three raylets, driven by the `dbtrain train` command, while faults are
drawn: workers, raylets and drivers are killed, workers frozen, checkpoints damaged, logs torn, and a worker that was
taken for dead wakes up. At the end:

* the assembled model has the digest of the run that was trained undisturbed, in one process;
* every fault cost each block that it hit one checkpoint interval at most (exceptions: `chaos_checks.judge`);
* no block that a fault did not hit lost a single step.

The exit code says whether all of that holds. The seed decides kinds, victims and moments (in steps of the victim);
what the machine does in between is its own, so that a repeated seed gives similar, not equal, runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos_checks import Fault, Verdict, late_lines, verdict
from chaos_faults import FAULTS, PATIENCE, Chaos, damage_checkpoint
from disturbed_run import BLOCKS, DisturbedRun, assembled_digest, closing_process, small_run, start_undisturbed
from local_cluster import bare_cluster, wait_for

from dbtrain.data.prepare import prepare

NODES, CPUS = 3, 2
HEARTBEAT_SECONDS = 6.0
# So that a raylet that does not answer is dead after about 10 s. Ray's defaults take about half a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
Draw = tuple[Callable[[Chaos, int], Fault], int, int]


def draw_faults(dice: random.Random, names: Sequence[str], count: int, every: int) -> list[Draw]:
    """Kind, victim and the steps that the victim makes first. The first ones are one of each kind, in any order."""
    weights = {kind: weight for kind, weight in FAULTS.items() if kind.__name__ in names}
    kinds = dice.sample(list(weights), k=len(weights))[:count]
    kinds += dice.choices(list(weights), weights=list(weights.values()), k=count - len(kinds))
    return [(kind, dice.randrange(BLOCKS), dice.randint(1, 2 * every)) for kind in kinds]


def disturb(chaos: Chaos, draws: Sequence[Draw], say: Callable[[str], None]) -> list[Fault]:
    """Do one after the other; ends early when the run is over."""
    faults: list[Fault] = []
    started = time.monotonic()
    for kind, drawn, steps in draws:
        while (blocks := chaos.run.unfinished()) and not chaos.run.done():
            block = min(blocks, key=lambda index: (index - drawn) % BLOCKS)
            if not chaos.run.wait_until_running(block, steps, PATIENCE):
                continue  # it came to its end meanwhile
            if kind is damage_checkpoint and len(chaos.intact(block)) < 2:
                steps += 10
                continue
            fault = kind(chaos, block)
            fault.number = len(faults) + 1
            faults.append(fault)
            say(describe(fault, time.monotonic() - started))
            break
        else:
            return faults
    return faults


def describe(fault: Fault, seconds: float) -> str:
    """One line."""
    where = ", ".join(f"block {block} at step {step}" for block, step in fault.steps.items()) or "no block"
    note = f"; {fault.note}" if fault.note else ""
    return f"{seconds:7.1f} s  {fault.number:3}  {fault.kind:<17}  {where}{note}"


def table(faults: Sequence[Fault], found: Verdict) -> str:
    """What every fault cost."""
    rows = [f"{'':>4} {'fault':<18} {'hit':<12} {'steps lost':<20} {'s to next step':<16} remark"]
    for fault in faults:
        mine = [f for f in found.findings if f.faults and f.faults[0] == fault.number]
        lost = " ".join(str(f.resumption.lost) for f in mine)
        waits = [f.resumption.time - fault.time for f in mine]
        wait = f"{min(waits):.1f} to {max(waits):.1f}" if len(waits) > 1 else "".join(f"{w:.1f}" for w in waits)
        remarks = [fault.note] if fault.note else []
        remarks += ["died while saving"] if any(f.in_flight for f in mine) else []
        others = sorted({number for f in mine for number in f.faults[1:]})
        remarks += [f"and {others} before it was back"] if others else []
        remarks += [f.problem for f in mine if f.problem]
        hits = " ".join(map(str, fault.attempts))
        rows.append(
            f"{fault.number:>4} {fault.kind:<18} {hits:<12} {lost:<20} {wait:<16} {'; '.join(remarks)}".rstrip()
        )
    return "\n".join(rows)


def run_chaos(
    folder: Path,
    seed: int,
    kinds: Sequence[str],
    count: int,
    steps: int,
    every: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train undisturbed and disturbed; returns the raw facts, with `problems` empty if all is as it should be.

    Args:
        folder: where everything goes, and stays.
        seed: of the draw.
        kinds: names of the functions in `chaos_faults.FAULTS` to draw from.
        count: faults.
        steps: steps of each block.
        every: steps between checkpoints.
        seconds: from the last fault to the end of the run, at most.
        say: gets a line for every fault.
    """
    config = small_run(folder, steps, every, heartbeat_timeout=HEARTBEAT_SECONDS, max_restarts=20, nodes="spread")
    dice = random.Random(seed)
    began = time.monotonic()
    prepare("digits", folder / "digits")
    undisturbed = start_undisturbed(config, folder / "undisturbed")
    with closing_process(undisturbed), bare_cluster() as cluster:
        cluster.start_head(CPUS, extra=HEALTH)
        for _ in range(NODES - 1):
            cluster.add_node(CPUS)
        run = DisturbedRun(folder, config, cluster.address, cluster.environment())
        try:
            run.start_driver()
            faults = disturb(Chaos(run, cluster, CPUS, dice), draw_faults(dice, kinds, count, every), say)
            wait_for(run.done, "the run to end", seconds)
        finally:
            run.close()
        run.look()
        if undisturbed.wait(seconds) != 0:
            raise RuntimeError(f"the undisturbed run failed: {folder}")
    expected = assembled_digest(folder / "undisturbed")
    assert run.driver is not None
    code = run.driver.returncode
    digest = assembled_digest(run.path) if code == 0 else f"none: exit code {code}: {run.last_words()}"
    lines = [block.steps for block in run.blocks]
    found = verdict(faults, lines, every, count, digest, expected)
    problems = list(found.problems)
    if code == 0 and len(run.output().read_text().splitlines()) != 1:
        problems.append(f"standard output of --json holds more than the result: {run.output().read_text()[:300]}")
    say("\n" + table(faults, found))
    return {
        "seed": seed,
        "steps": steps,
        "every": every,
        "seconds": time.monotonic() - began,
        "digest": digest,
        "expected": expected,
        "faults": [asdict(fault) for fault in faults],
        "resumptions": [asdict(finding) | {"lost": finding.resumption.lost} for finding in found.findings],
        "late_lines": [late_lines(block) for block in lines],
        "problems": problems,
    }


def summary(facts: dict[str, Any]) -> str:
    """The last lines."""
    lost = [found["lost"] for found in facts["resumptions"]]
    saving = sum(found["in_flight"] for found in facts["resumptions"])
    return "\n".join(
        [
            f"{len(facts['faults'])} faults; {len(lost)} times a block had to go back, by {max(lost, default=0)} steps"
            f" at most and {sum(lost) / max(len(lost), 1):.0f} in the mean; checkpoints every {facts['every']} steps",
            f"{saving} times a worker died while it was saving, and went back to the checkpoint before",
            f"lines that replaced workers still wrote to their metrics: {sum(facts['late_lines'])}",
            f"digest {facts['digest']}, undisturbed {facts['expected']}",
            *(f"PROBLEM: {problem}" for problem in facts["problems"]),
            f"{'all holds' if not facts['problems'] else 'FAILED'}; seed {facts['seed']}, {facts['seconds']:.0f} s",
        ]
    )


def main() -> None:
    """Print the seed, every fault as it happens, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="drawn, and printed, when not given")
    parser.add_argument("--faults", type=int, default=30)
    names = [kind.__name__ for kind in FAULTS]
    parser.add_argument("--kinds", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, help="of each block; 500 a fault when not given")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seconds", type=float, default=900.0, help="from the last fault to the end, at most")
    parser.add_argument("--json", type=Path, help="file for the raw facts")
    args = parser.parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="dbtrain-chaos-"))
    steps = 500 * args.faults if args.steps is None else args.steps
    say = functools.partial(print, flush=True)
    facts = run_chaos(folder, seed, args.kinds, args.faults, steps, args.every, args.seconds, say)
    print(summary(facts))
    if args.json is not None:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    if facts["problems"]:
        raise SystemExit(f"the runs are kept: {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
