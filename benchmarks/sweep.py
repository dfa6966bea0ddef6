"""Many small runs, a table at the end: the rows of a sweep file, each over several seeds, one Ray task a run.

    python benchmarks/sweep.py benchmarks/sweeps/noise-vit.yaml --runs runs/noise-vit

Every run is an ordinary run directory below --runs, so that the same command goes on after any interruption, and only
reads what is finished. With `tune` in the file every row first tries the same values on seeds of their own, and reports
the best. A run that fails is told in the table and costs no other; the exit code is 1 then. The figures of every seed
are in <runs>/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from quality import summarise
from sweep_file import ROOT, SweepFile, expand, read_sweep
from sweep_runs import RowOutcome, run_all

import dbtrain
from dbtrain.errors import UserError
from dbtrain.orchestration.ray_cluster import connect
from dbtrain.storage import Storage

DASH = "–"


def table(sweep: SweepFile, rows: Sequence[RowOutcome]) -> str:
    """Markdown, a line a row. Failures have a column if there are any."""
    metrics = {one.metric: None for row in rows for one in row.measured}
    named = list(dict.fromkeys(name for row in rows for one in row.measured for name in one.figures))
    figures = named if sweep.figures is None else sweep.figures
    head = ["", *figures]
    head += [sweep.tune.field] if sweep.tune is not None else []
    head += ["layer-evaluations", "FLOPs"]
    failed = any(row.failures for row in rows)
    head += ["failed"] if failed else []
    lines = [_cells(head), "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.jobs.row.name, *(_figure(row, name) for name in figures)]
        cells += [row.value or DASH] if sweep.tune is not None else []
        done = row.measured
        cells += [f"{done[0].layer_evaluations:,}", f"{done[0].flops:.3g}"] if done else [DASH, DASH]
        cells += ["; ".join(row.failures) or DASH] if failed else []
        lines.append(_cells(cells))
    said = "; ".join(f"{metric.title}, {metric.better} is better" for metric in metrics) or "nothing measured"
    seeds = ", ".join(map(str, sweep.seeds))
    return f"{said}; mean ± sample standard deviation over seeds {seeds}\n\n" + "\n".join(lines)


def summary(sweep: SweepFile, rows: Sequence[RowOutcome]) -> dict[str, Any]:
    """The same as plain data, with the figures of every seed, and where they come from."""
    return {
        "about": about(),
        "sweep": sweep.model_dump(mode="json"),
        "rows": [_row_summary(sweep, row) for row in rows],
    }


def about() -> dict[str, Any]:
    """Machine, versions and commit; a commit ends with -dirty where files have changed since."""
    import ray

    commit: str | None = None
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # an unpacked archive
    return {
        "machine": {"name": platform.node(), "system": platform.platform(), "processor": platform.machine()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": ray.__version__,
            "dbtrain": dbtrain.__version__,
        },
        "commit": commit,
    }


def _row_summary(sweep: SweepFile, row: RowOutcome) -> dict[str, Any]:
    done = row.measured
    names = list(dict.fromkeys(name for one in done for name in one.figures))
    values = {name: [one.figures[name] for one in done if name in one.figures] for name in names}
    tuned = None
    if sweep.tune is not None and row.jobs.tuning:
        tried = [{"value": yaml.safe_load(value), "mean": mean} for value, mean in row.means().items()]
        chosen = None if row.value is None else yaml.safe_load(row.value)
        tuned = {"field": sweep.tune.field, "value": chosen, "tried": tried}
    return {
        "name": row.jobs.row.name,
        "kind": row.jobs.row.kind,
        "metric": done[0].metric.name if done else None,
        "predict": done[0].predict if done else None,
        "figures": {
            name: {
                "mean": _number(statistics.fmean(found)),
                "stdev": _number(statistics.stdev(found)) if len(found) > 1 else None,
                "values": [_number(value) for value in found],
            }
            for name, found in values.items()
        },
        "tuned": tuned,
        "layer_evaluations": done[0].layer_evaluations if done else None,
        "flops": done[0].flops if done else None,
        "runs": [job.folder for job in row.reported],
        "failed": row.failures,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no others


def _figure(row: RowOutcome, name: str) -> str:
    values = [one.figures[name] for one in row.measured if name in one.figures]
    return summarise(row.measured[0].metric, name, values) if values else DASH


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def sweep(arguments: argparse.Namespace) -> int:
    """Validate everything, run everything, print the table; the exit code."""
    file = read_sweep(arguments.sweep, arguments.seeds, arguments.rows)
    rows = expand(file, arguments.overrides)
    folder = arguments.runs.resolve()
    cluster = connect(arguments.address, arguments.cpus)
    try:
        outcomes = run_all(rows, folder, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        cluster.close()
    Storage.open(folder).write_atomic("sweep.json", (json.dumps(summary(file, outcomes), indent=2) + "\n").encode())
    print(table(file, outcomes))
    return 1 if any(row.failures for row in outcomes) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; mistakes are one line each on standard error, and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="YAML file; benchmarks/sweeps holds some")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run directories")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="of all rows")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the file")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these alone")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cpus", type=int, help="runs at once, of a Ray started here; one a core when not given")
    where.add_argument("--address", help="of a Ray cluster whose nodes all see the repository and --runs")
    arguments = parser.parse_args(argv)
    if arguments.cpus is not None and arguments.cpus < 1:
        parser.error("--cpus has to be at least 1")
    try:
        return sweep(arguments)
    except UserError as mistake:
        for line in str(mistake).splitlines():
            print(f"sweep: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command goes on", file=sys.stderr)
        return 1


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
