"""Seconds until a metric is reached: blocks on N workers, the end-to-end network on one, and DDP of it on N.

    python benchmarks/time_to_metric.py [configs/demo/vit.yaml] [--steps 250 500] [--target 0.88] [--json]

A learning rate that falls to its end makes a run of another length another run, so each side is trained anew for every
number of steps, on one Ray cluster of this machine, by turns. Steps are those of the blocks; the end-to-end network
takes as many as make its layer-evaluations equal. DDP shares each of its batches out to N replicas.

* seconds: from the start of a run to its end by its journal, median of the seeds: workers start, train, and write the
  last checkpoint. Evaluation is not in them;
* start: what of them passes until the first worker trains;
* reached: the fastest length of each side whose mean over the seeds reaches the target, which is one of the
  evaluation's metric (an accuracy as a fraction).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench import table
from quality import RunFailed, train_one

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config
from dbtrain.errors import UserError
from dbtrain.inference.runs import evaluation_of
from dbtrain.orchestration.ray_cluster import connect
from dbtrain.plan import Kind

RECIPE = Path(__file__).parents[1] / "configs" / "demo" / "vit.yaml"


@dataclass
class Length:
    """A side trained for a number of steps, and what came of it."""

    side: str
    steps: int
    kind: Kind
    configs: Sequence[RunConfig]
    """One a seed."""
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """For the table."""
        return {
            "side": self.side,
            "steps": self.steps,
            "value": statistics.mean(self.values),
            "spread": statistics.stdev(self.values) if len(self.values) > 1 else 0.0,
            "seconds": statistics.median(self.seconds),
            "start": statistics.median(self.starts),
        }


def lengths(
    recipe: Path, overrides: Sequence[str], steps: Sequence[int], seeds: Sequence[int], workers: int
) -> list[Length]:
    """Everything that will be trained, one block for each worker.

    Raises:
        UserError: the recipe does not go with so many workers.
    """
    several = [f"blocks.count={workers}"]
    sides: list[tuple[str, Kind, list[str]]] = [
        (f"{workers} blocks, a worker each", "blocks", several),
        ("end to end, one worker", "end_to_end", several),
    ]
    if workers > 1:
        replicas = [*several, f"resources.replicas={workers}"]
        sides.append((f"end to end, DDP on {workers}", "end_to_end", replicas))
    return [
        Length(
            name,
            count,
            kind,
            [load_config(recipe, [*overrides, *more, f"training.steps={count}", f"seed={seed}"]) for seed in seeds],
        )
        for count in steps
        for name, kind, more in sides
    ]


def measure(found: Sequence[Length], workers: int, folder: Path) -> Literal["higher", "lower"]:
    """Train and evaluate everything, seed by seed; says whether more of the metric is better.

    Raises:
        RunFailed: one did not come to its end.
        UserError: so it is, for a reason that lies with the user.
    """
    with closing(connect(cpus=workers)):
        train_one(found[0].configs[0], found[0].kind, folder / "warm", "ray")
        for seed in range(len(found[0].configs)):
            for number, length in enumerate(found):
                run = train_one(length.configs[seed], length.kind, folder / f"{number}-{seed}", "ray")
                evaluation = evaluation_of(run)
                when: dict[str, float] = {}
                for event in run.events():
                    when.setdefault(event["event"], event["time"])  # the first of its kind
                length.values.append(evaluation.value)
                length.seconds.append(when["run_ended"] - when["run_started"])
                length.starts.append(when["block_running"] - when["run_started"])
    return evaluation.metric.better


def reached(rows: Sequence[dict[str, Any]], target: float, better: Literal["higher", "lower"]) -> list[dict[str, Any]]:
    """For each side the fastest of its lengths that reaches the target, and its seconds; nothing where none does."""
    sign = 1 if better == "higher" else -1
    found = []
    for name in dict.fromkeys(row["side"] for row in rows):
        enough = [row for row in rows if row["side"] == name and sign * row["value"] >= sign * target]
        best = min(enough, key=lambda row: float(row["seconds"]), default={"steps": "", "seconds": ""})
        found.append({"side": name, "steps": best["steps"], "seconds": best["seconds"]})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--workers", type=int, help="the most, up to the cores, that the recipe can be cut for")
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500], help="lengths of a run (default: 250 500)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.88, help="of the metric (default: 0.88)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    tried = [options.workers] if options.workers else list(range(os.cpu_count() or 1, 0, -1))
    try:
        for workers in tried:
            try:
                found = lengths(options.config, options.overrides, options.steps, options.seeds, workers)
                break
            except UserError:
                if workers == tried[-1]:
                    raise
        with tempfile.TemporaryDirectory(prefix="dbtrain-metric-") as folder:
            better = measure(found, workers, Path(folder))
    except (UserError, RunFailed) as error:
        parser.exit(2, f"{error}\n")
    rows = [length.row() for length in found]
    figures = {"target": options.target, "lengths": rows, "reached": reached(rows, options.target, better)}
    print(json.dumps(figures) if options.json else table(figures))


if __name__ == "__main__":
    main()
