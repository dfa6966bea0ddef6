"""Blocks beside the end-to-end network over several seeds, at equal layer-evaluations: the tables of docs/results.md.

    python benchmarks/quality.py configs/demo/vit.yaml --seeds 0 1 2 3 4 --runs runs/quality-digits

Every run is an ordinary run directory below --runs: stopping and starting again goes on, and a second call only
reads. `--set` overrides fields, as for `dbtrain train`. For tables of other rows there is benchmarks/sweep.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config
from dbtrain.errors import CorruptData, UserError
from dbtrain.inference.evaluation import SO_FAR, Evaluation, Metric
from dbtrain.inference.runs import evaluation_of
from dbtrain.orchestration.run import BackendName, train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.plan import Kind
from dbtrain.run_directory import RunDirectory


class RunFailed(Exception):
    """A run that did not come to its end; `str()` says which block was the first, and why."""


def train_one(config: RunConfig, kind: Kind, folder: Path, backend: BackendName = "inline") -> RunDirectory:
    """Train (or find) one run.

    Raises:
        RunFailed: a block has failed, or was stopped.
    """
    result = train_run(config, folder, kind, backend)
    if not result.ok:
        unfinished = [block for block in result.blocks if block.state is not BlockState.FINISHED]
        first = unfinished[0]
        others = f" (and {len(unfinished) - 1} more)" if len(unfinished) > 1 else ""
        reason = first.reason or f"at step {first.step}"
        raise RunFailed(f"block {first.index} {first.state.value}{others}: {reason}")
    return RunDirectory.open(str(folder))


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Everything an evaluation says, by name."""
    name = evaluation.metric.name
    found = dict(evaluation.readouts)
    found |= {f"ece: {readout}": value for readout, value in evaluation.calibration.items()}
    found |= {f"alone: block {int(p['block'])}": p[name] for p in evaluation.alone if name in p}
    found |= {f"chain: step {i}": p[name] for i, p in enumerate(evaluation.chain) if name in p}
    found |= {f"product up to step {i}": p[SO_FAR] for i, p in enumerate(evaluation.chain) if SO_FAR in p}
    for point in evaluation.without:
        found |= {f"without block {int(point['block'])}: {key}": point[key] for key in point if key != "block"}
    return found | {f"also: {key}": value for key, value in evaluation.also.items()}


def summarise(metric: Metric, name: str, values: Sequence[float]) -> str:
    """Mean and sample standard deviation; of a single value there is no deviation."""
    show = (lambda value: f"{value:.4g}") if name.startswith("also: ") else metric.show
    mean = show(statistics.mean(values))
    return f"{mean} ± {show(statistics.stdev(values))}" if len(values) > 1 else mean


def main() -> None:
    """Train, evaluate, print a Markdown table and write it all to <runs>/quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--backend", choices=["inline", "ray"], default="inline")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parser.parse_args()

    found: dict[str, dict[str, list[float]]] = {}
    metric: Metric | None = None
    kinds: list[Kind] = ["end_to_end", "blocks"]
    for seed in arguments.seeds:
        config = load_config(arguments.config, [*arguments.overrides, f"seed={seed}"])
        judge: RunDirectory | None = None
        for kind in kinds:
            folder = arguments.runs / f"run-{kind}-seed{seed}"
            try:
                run = train_one(config, kind, folder, arguments.backend)
            except RunFailed as error:
                raise SystemExit(f"{folder}: {error}") from None
            evaluation = evaluation_of(run, judge=judge)
            judge = run if kind == "end_to_end" else judge
            metric, values_of = evaluation.metric, figures_of(evaluation)
            row = found.setdefault(kind, {})
            for key, value in values_of.items():
                row.setdefault(key, []).append(value)
            print(
                f"{folder}: {json.dumps(values_of)}  ({run.plan.layer_evaluations:,} layer-evaluations,"
                f" {run.plan.flops:.3g} FLOPs)",
                flush=True,
            )
    assert metric is not None
    print_tables(metric, found, len(arguments.seeds))
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    (arguments.runs / "quality.json").write_text(json.dumps({**about, metric.name: found}, indent=2))


def print_tables(metric: Metric, found: dict[str, dict[str, list[float]]], count: int, what: str = "seeds") -> None:
    """One Markdown table a variant: every figure's mean and spread over `count` seeds, or whatever they differ by."""
    for name, rows in found.items():
        print(
            f"\n{name}, {count} {what}, {metric.title} (mean ± standard deviation; {metric.better} is better)\n\n"
            f"| | {metric.title} |\n|---|---|"
        )
        for key, values in rows.items():
            print(f"| {key} | {summarise(metric, key, values)} |")


def print_joined(
    description: str | None, name: str, measure: Callable[[list[str]], tuple[Metric, dict[str, float]]]
) -> None:
    """The whole of a program whose arguments are runs joined by +: measure what each group makes together, and print
    one table over the groups. A user's mistake ends it with exit code 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="RUN+RUN+...")
    groups = parser.parse_args().groups
    found: dict[str, list[float]] = {}
    for group in groups:
        try:
            metric, figures = measure(group.split("+"))
        except (UserError, CorruptData) as error:
            parser.exit(2, f"{error}\n")
        for key, value in figures.items():
            found.setdefault(key, []).append(value)
    print_tables(metric, {name: found}, len(groups), "groups")


if __name__ == "__main__":
    main()
