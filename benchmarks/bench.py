"""The performance benchmarks one after another: a table each, and all figures in one JSON file.

    python benchmarks/bench.py [NAME ...] [--out runs/bench.json]

A benchmark is a script that can be run alone, and that prints one JSON object and nothing else when it is called with
`--json`: its figures by name, and a list of rows for each table. A line in `BENCHMARKS` adds it here. The file tells
the machine, the versions, the commit and the date as well; it is written anew after each benchmark, and figures of
benchmarks that are not run this time stay in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dbtrain.training.machine import machine_facts

HERE = Path(__file__).parent
BENCHMARKS: dict[str, list[str]] = {
    "trainer": [],
    "loader": [],
    "memory": [],
    "inference": [],
    "scaling": [],
    "time_to_metric": [],
    "coordinator": [],
    "recovery": ["--kills", "5"],
}
"""Name of the script -> its arguments, in the order in which they run."""


def run(name: str) -> dict[str, Any]:
    """Figures of one benchmark, run in a process of its own. What it writes to standard error is shown.

    Raises:
        subprocess.CalledProcessError: it failed.
        ValueError: what it printed is not one JSON object.
    """
    command = [sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name], "--json"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(printed)
    return figures


def table(figures: dict[str, Any]) -> str:
    """Markdown: what is a single figure in one table of two columns, and each list of rows in a table of its own."""
    single = _flat({name: value for name, value in figures.items() if not _is_rows(value)})
    tables = [_markdown(["figure", "value"], [[name, value] for name, value in single.items()])] if single else []
    for rows in ([_flat(row) for row in value] for value in figures.values() if _is_rows(value)):
        heads = list(dict.fromkeys(head for row in rows for head in row))
        tables.append(_markdown(heads, [[row.get(head, "") for head in heads] for row in rows]))
    return "\n\n".join(tables)


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures within figures by both names."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        inner = (
            {f"{name}: {key}": one for key, one in _flat(value).items()} if isinstance(value, dict) else {name: value}
        )
        found |= inner
    return found


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _markdown(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def about() -> dict[str, Any]:
    """Where and when."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    facts = machine_facts(device)
    # The name of a machine is nobody's business.
    kept = {name: facts[name] for name in ("processor", "cores", "memory", "device", "device_memory", "python")}
    return {
        **kept,
        "versions": {**facts["versions"], "pyarrow": version("pyarrow")},
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    """What git prints; nothing where this is no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def main() -> int:
    """Run, print, write. Exit code 1 if a benchmark failed; the others are run all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="default: runs/bench.json")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.names or BENCHMARKS:
        start = time.perf_counter()
        print(f"\n## {name}\n", flush=True)
        try:
            figures = run(name)
        except (subprocess.CalledProcessError, ValueError) as error:
            print(f"failed: {error}", flush=True)
            failed.append(name)
            continue
        print(f"{table(figures)}\n\n{time.perf_counter() - start:.0f} s", flush=True)
        found[name] = {"about": about(), "arguments": BENCHMARKS[name], "figures": figures}
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nall figures: {arguments.out}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
