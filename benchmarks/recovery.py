"""How long a block stands still when its worker dies, beside the time that any worker takes to start.

    python benchmarks/recovery.py --kills 10 [--json]

On a local cluster with a single block in training, the worker is killed with SIGKILL again and again:

* recovery: from the kill to the first new step in the block's metrics, as the run directory tells it: noticing the
  death, the coordinator's back-off, a new process, importing PyTorch, loading the checkpoint, and the step;
* start: from asking Ray for an actor that imports PyTorch to its first answer, by a program that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from disturbed_run import DisturbedRun, kill_and_wait, now, small_run
from local_cluster import LocalCluster, local_cluster

EVERY = 100
SECONDS = 120.0
ACTOR = """
import json, sys, time
import ray

@ray.remote(num_cpus=1)
class Worker:
    def answer(self):
        import torch
        return torch.__version__

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="WARNING")
seconds = []
for _ in range(int(sys.argv[2])):
    began = time.monotonic()
    worker = Worker.remote()
    ray.get(worker.answer.remote())
    seconds.append(time.monotonic() - began)
    ray.kill(worker)
print(json.dumps(seconds))
"""


def start_times(cluster: LocalCluster, count: int) -> list[float]:
    """Seconds from asking Ray for an actor to its first answer, with PyTorch imported."""
    command = [sys.executable, "-c", ACTOR, cluster.address, str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=cluster.environment())
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def recovery_times(cluster: LocalCluster, folder: Path, count: int) -> list[float]:
    """Seconds from killing a block's only worker to its first new step."""
    config = small_run(folder, 10**6, EVERY)
    raw = yaml.safe_load(config.read_text())
    raw["model"]["depth"] = raw["blocks"]["count"] = 1
    config.write_text(yaml.safe_dump(raw))
    run = DisturbedRun(folder, config, cluster.address, cluster.environment())
    block = run.blocks[0]
    seconds = []
    run.start_driver()
    try:
        for _ in range(count):
            # More than an interval: a block that makes no checkpoint between two deaths waits longer each time.
            assert run.wait_until_running(0, 3 * EVERY, SECONDS), run.last_words()
            assert block.pid is not None
            began, attempt = now(), block.attempt
            kill_and_wait(block.pid)
            assert run.wait_until_running(0, 1, SECONDS), run.last_words()
            first = next(time for time, number, _ in block.steps if number > attempt)
            seconds.append(first - began)
    finally:
        run.close()
    return seconds


def row(name: str, seconds: Sequence[float]) -> dict[str, str | float]:
    """Of the table."""
    return {"seconds": name, "median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def main() -> None:
    """Measure both and print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dbtrain-recovery-"))
    try:
        with local_cluster(nodes=1, cpus=2) as cluster:
            recovery = recovery_times(cluster, folder, args.kills)
            start = start_times(cluster, args.kills)
    finally:
        shutil.rmtree(folder)
    rows = [
        row("an actor that imports PyTorch, from asking to its first answer", start),
        row("a block, from SIGKILL of its worker to its first new step", recovery),
    ]
    if args.json:
        print(json.dumps({"times": args.kills, "rows": rows}))
        return
    print(f"{args.kills} times each, on {platform.machine()} with {os.cpu_count()} cores\n")
    print("| seconds | median | least | most |\n|---|---|---|---|")
    for line in rows:
        print(f"| {line['seconds']} | {line['median']:.1f} | {line['least']:.1f} | {line['most']:.1f} |")


if __name__ == "__main__":
    main()
