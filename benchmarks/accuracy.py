"""Blocks beside the end-to-end network over several seeds, at equal layer-evaluations: the tables of docs/results.md.

    python benchmarks/accuracy.py configs/demo/vit.yaml --seeds 0 1 2 3 4 --runs runs/accuracy-digits

Every run is an ordinary run directory below --runs: stopping and starting again goes on, and a second call only
reads. `--set` overrides fields, as for `dbtrain train`; a field named in `--vary` gives one table row a value.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from dbtrain.config_file import load_config
from dbtrain.inference.evaluate import Evaluation
from dbtrain.inference.runs import evaluation_of
from dbtrain.orchestration.run import BackendName, train_run
from dbtrain.plan import Kind
from dbtrain.run_directory import RunDirectory


def run_one(
    config: Path, overrides: Sequence[str], kind: Kind, folder: Path, backend: BackendName
) -> tuple[RunDirectory, Evaluation]:
    """Train (or find) one run and evaluate it."""
    result = train_run(load_config(config, overrides), folder, kind, backend)
    if not result.ok:
        raise SystemExit(f"{folder}: {result.to_json()}")
    run = RunDirectory.open(str(folder))
    return run, evaluation_of(run)


def summarise(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * spread:.2f}"


def main() -> None:
    """Train, evaluate, print a Markdown table and write it all to <runs>/accuracy.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--backend", choices=["inline", "ray"], default="inline")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--vary", metavar="A.B=C,D", help="one row a value, blocks alone (no baseline)")
    arguments = parser.parse_args()

    variants: list[tuple[str, list[str], list[Kind]]] = [("", [], ["blocks", "end_to_end"])]
    if arguments.vary:
        field, _, values = arguments.vary.partition("=")
        variants = [(f"{field}={value}", [f"{field}={value}"], ["blocks"]) for value in values.split(",")]
    found: dict[str, dict[str, list[float]]] = {}
    for name, extra, kinds in variants:
        for seed in arguments.seeds:
            for kind in kinds:
                overrides = [*arguments.overrides, *extra, f"seed={seed}"]
                folder = arguments.runs / f"{name or 'run'}-{kind}-seed{seed}"
                run, evaluation = run_one(arguments.config, overrides, kind, folder, arguments.backend)
                values_of = dict(evaluation.readouts)
                values_of |= {f"alone: block {int(p['block'])}": p["accuracy"] for p in evaluation.alone}
                values_of |= {f"chain: step {i}": p["accuracy"] for i, p in enumerate(evaluation.chain)}
                row = found.setdefault(f"{name} {kind}".strip(), {})
                for key, value in values_of.items():
                    row.setdefault(key, []).append(value)
                print(
                    f"{folder}: {json.dumps(values_of)}  ({run.plan.layer_evaluations:,} layer-evaluations)", flush=True
                )
    print_tables(found, len(arguments.seeds))
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    (arguments.runs / "accuracy.json").write_text(json.dumps({**about, "accuracy": found}, indent=2))


def print_tables(found: dict[str, dict[str, list[float]]], seeds: int) -> None:
    """One Markdown table a variant: every read-out's mean and spread."""
    for name, rows in found.items():
        print(
            f"\n{name}, {seeds} seeds, accuracy in % (mean ± standard deviation)\n\n| read-out | accuracy |\n|---|---|"
        )
        for key, values in rows.items():
            print(f"| {key} | {summarise(values)} |")


if __name__ == "__main__":
    main()
