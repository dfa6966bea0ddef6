"""Seconds until a metric is reached: blocks on N workers, the end-to-end network on one, and DDP of it on N.

    python benchmarks/time_to_metric.py [configs/demo/vit.yaml] [--steps 250 500 1000] [--target 0.95] [--json]

A learning rate that falls to its end makes a run of another length another run, so each side is trained anew for every
number of steps, on one Ray cluster of this machine. The end-to-end network takes as many steps as blocks do, or fewer
where that makes layer-evaluations equal; DDP shares each of its batches out to N replicas. Seconds are those from the
start of a run to its end by its journal, the median of the seeds: workers start, train, and write the last checkpoint.
Evaluation is not in them.

A target (of the evaluation's metric; an accuracy as a fraction) is reached by the fastest length whose mean over the
seeds reaches it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bench import table
from quality import train_one

from dbtrain.config_file import load_config
from dbtrain.inference.compare import driven_seconds
from dbtrain.inference.evaluation import Metric
from dbtrain.inference.runs import evaluation_of
from dbtrain.orchestration.ray_cluster import connect
from dbtrain.plan import Kind

RECIPE = Path(__file__).parents[1] / "configs" / "demo" / "vit.yaml"


def sides(workers: int) -> dict[str, tuple[Kind, list[str]]]:
    """Name -> what is trained, and its overrides; one block a worker."""
    return {
        f"{workers} blocks, a worker each": ("blocks", [f"blocks.count={workers}"]),
        "end to end, one worker": ("end_to_end", [f"blocks.count={workers}"]),
        f"end to end, DDP on {workers}": ("end_to_end", [f"blocks.count={workers}", f"resources.replicas={workers}"]),
    }


def measure(
    recipe: Path, overrides: Sequence[str], budgets: Sequence[int], seeds: Sequence[int], workers: int, folder: Path
) -> tuple[Metric, list[dict[str, Any]]]:
    """A row for each side and length, and what the metric is."""
    rows: list[dict[str, Any]] = []
    metric: Metric | None = None
    with closing(connect(cpus=workers)):
        for name, (kind, settings) in sides(workers).items():
            for steps in budgets:
                values, seconds = [], []
                for seed in seeds:
                    config = load_config(recipe, [*overrides, *settings, f"training.steps={steps}", f"seed={seed}"])
                    run = train_one(config, kind, folder / f"{len(rows)}-{seed}", "ray")
                    evaluation = evaluation_of(run)
                    metric = evaluation.metric
                    values.append(evaluation.value)
                    seconds.append(driven_seconds(run.events())[0])
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                rows.append(
                    {
                        "side": name,
                        "steps": run.plan.steps,
                        "value": statistics.mean(values),
                        "spread": spread,
                        "seconds": statistics.median(seconds),
                    }
                )
    assert metric is not None
    return metric, rows


def reached(rows: Sequence[dict[str, Any]], target: float, metric: Metric) -> list[dict[str, Any]]:
    """For each side the shortest of its runs that reaches the target; nothing where none does."""
    sign = 1 if metric.better == "higher" else -1
    found = []
    for name in dict.fromkeys(row["side"] for row in rows):
        enough = [row for row in rows if row["side"] == name and sign * row["value"] >= sign * target]
        best = min(enough, key=lambda row: float(row["seconds"]), default=None)
        found.append({"side": name, "steps": best["steps"] if best else "", "seconds": best["seconds"] if best else ""})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="the cores when not given")
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500, 1000], help="lengths of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.95, help="of the metric (default: 0.95)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dbtrain-metric-") as folder:
        metric, rows = measure(
            options.config, options.overrides, options.steps, options.seeds, options.workers, Path(folder)
        )
    figures = {"target": options.target, "lengths": rows, "reached": reached(rows, options.target, metric)}
    print(json.dumps(figures) if options.json else table(figures))


if __name__ == "__main__":
    main()
