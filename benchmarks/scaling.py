"""Blocks on 1 to N workers beside the end-to-end network on one worker, and on N by DistributedDataParallel.

    python benchmarks/scaling.py [--workers 2] [--json]

Real `dbtrain train` and `dbtrain baseline` on a local Ray cluster with a node a worker. Samples a second are read from
the steps in the metrics files while all workers train; starting up is left out.

* scaling: the blocks' workers stay as they are, and all but n of them are frozen (SIGSTOP) for a window, so that 1 and
  N workers are measured by turns in one run. Efficiency is the rate of n together over n times the rate of one, the
  median of the rounds.
* end to end: one worker; then N replicas of it (DDP over gloo), each on batches as large as a block's worker has.
* bytes: what each worker's process sent and received over TCP while all trained, by the kernel's count, and what of it
  came from or went to another worker; beside it what the node's other processes (Ray's own) exchange.
* beside training: processor time of Ray's own processes and of the driver meanwhile, which is lost to training where
  there are as many workers as cores.

The blocks stay at one size: the network has as many of them as there are workers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from disturbed_run import DBTRAIN, Tail
from local_cluster import LocalCluster, local_cluster, wait_for
from traffic import connections, exchanged

LAYERS = 4
"""Of each block."""
BATCH = 128
"""Samples in a step of each worker."""
WARM_UP_STEPS = 5
SETTLE_SECONDS = 1.0
START_SECONDS = 180.0


def write_config(folder: Path, workers: int) -> Path:
    """A ViT of width 128 on 8x8 digits with a block of four layers for every worker; returns the file."""
    config = {
        "name": "scaling",
        "model": {
            "family": "vit",
            "image_size": 8,
            "channels": 1,
            "num_classes": 10,
            "patch_size": 2,
            "depth": LAYERS * workers,
            "width": 128,
            "heads": 4,
            "mlp_width": 512,
        },
        "data": {"source": "digits", "path": str(folder / "digits"), "augment": {"crop_padding": 1}},
        "blocks": {"count": workers},
        "training": {"steps": 10**6, "batch_size": BATCH},
        "checkpoints": {"every": 10**6},
        "logging": {"every": 1},
        "resources": {"cpus": 1, "threads": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Training:
    """A run in training, seen through its metrics files and its processes."""

    def __init__(self, cluster: LocalCluster, path: Path, driver: int, blocks: int, workers: int):
        self._nodes, self._driver = cluster.nodes, driver
        self._tails = [Tail(path / f"blocks/{index:02d}/metrics.jsonl") for index in range(blocks)]
        self._steps: list[list[tuple[float, int]]] = [[] for _ in range(blocks)]
        self._pid_of: dict[int, int] = {}
        journal = Tail(path / "events.jsonl")

        def warm() -> bool:
            for line in journal.read():
                if line["event"] == "block_running":
                    self._pid_of[line["block"]] = line["pid"]
            self._look()
            return len(self.workers()) == workers and all(len(steps) > WARM_UP_STEPS for steps in self._steps)

        wait_for(warm, f"{path.name} to train", START_SECONDS)

    def workers(self) -> set[int]:
        """Process ids of those that train."""
        everything = (one for node in self._nodes for one in node.processes().items())
        return {pid for pid, line in everything if line.startswith("ray::BlockWorker")}

    def rates(self, seconds: float) -> list[float]:
        """Samples a second of each block in a window from now on; 0 where there was no step."""
        begin = time.time()
        time.sleep(seconds)
        end = time.time()
        self._look()
        found = []
        for steps in self._steps:
            window = [(at, samples) for at, samples in steps if begin <= at <= end]
            spans = len(window) > 1
            found.append((window[-1][1] - window[0][1]) / (window[-1][0] - window[0][0]) if spans else 0.0)
        return found

    @contextlib.contextmanager
    def only(self, count: int) -> Iterator[None]:
        """All but the workers of the first `count` blocks stand still."""
        frozen = [pid for block, pid in self._pid_of.items() if block >= count]
        try:
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(SETTLE_SECONDS)  # the pipelines and caches of those that go on
            yield
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)

    def costs(self, seconds: float) -> dict[str, float]:
        """While all train: bytes a second and worker, and cores that are busy with something else."""
        workers = self.workers()
        others = {pid for node in self._nodes for pid in node.processes()} - workers
        busy, before, start = processor_seconds(others | {self._driver}), connections(), time.monotonic()
        time.sleep(seconds)
        after, passed = connections(), time.monotonic() - start
        between = sum(exchanged(before, after, {pid}, workers - {pid}) for pid in workers)
        each = passed * len(workers)
        return {
            "worker_bytes_per_second": exchanged(before, after, workers) / each,
            "with_other_workers_bytes_per_second": between / each,
            "rest_of_node_bytes_per_second": exchanged(before, after, others) / each,
            "cores_beside_training": (processor_seconds(others | {self._driver}) - busy) / passed,
        }

    def _look(self) -> None:
        for steps, tail in zip(self._steps, self._tails, strict=True):
            steps += [(line["time"], line["samples"]) for line in tail.read()]


def processor_seconds(pids: set[int]) -> float:
    """Time that processes have had so far; nothing for those that are gone."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def training(
    cluster: LocalCluster, folder: Path, verb: str, blocks: int, workers: int, *settings: str
) -> Iterator[Training]:
    """A run that trains on so many workers, ended at the end."""
    path = folder / f"{verb}-{workers}"
    command = [*DBTRAIN, verb, str(folder / "config.yaml"), "--run", str(path), "--address", cluster.address, "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    with path.with_suffix(".err").open("wb") as err:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=cluster.environment())
    try:
        yield Training(cluster, path, driver.pid, blocks, workers)
    except TimeoutError as error:
        raise RuntimeError(f"{error}: {path.with_suffix('.err').read_text()[-2000:]}") from error
    finally:
        driver.kill()
        driver.wait()


def measure(workers: int, rounds: int, window: float) -> dict[str, Any]:
    """Everything, on a cluster of so many nodes of one worker each."""
    counts = sorted({1, workers} | {2**power for power in range(workers.bit_length()) if 2**power <= workers})
    folder = Path(tempfile.mkdtemp(prefix="dbtrain-scaling-"))
    result: dict[str, Any] = {"workers": workers, "layers_of_a_block": LAYERS, "batch_size": BATCH}
    try:
        write_config(folder, workers)
        with local_cluster(nodes=workers) as cluster:
            with training(cluster, folder, "train", workers, workers) as run:
                rates: dict[int, list[float]] = {count: [] for count in counts}
                for _ in range(rounds):
                    for count in counts:
                        with run.only(count):
                            rates[count].append(sum(run.rates(window)))
                result["blocks_costs"] = run.costs(2 * window)
            result["blocks"] = {
                str(count): {
                    "samples_per_second": statistics.median(found),
                    "efficiency": statistics.median(
                        all_of / (count * one) for all_of, one in zip(found, rates[1], strict=True)
                    ),
                }
                for count, found in rates.items()
            }
            with training(cluster, folder, "baseline", 1, 1) as run:
                result["end_to_end_samples_per_second"] = statistics.median(run.rates(window)[0] for _ in range(rounds))
            if workers > 1:
                settings = (f"resources.replicas={workers}", f"training.batch_size={BATCH * workers}")
                with training(cluster, folder, "baseline", 1, workers, *settings) as run:
                    rate = statistics.median(run.rates(window)[0] for _ in range(rounds))
                    costs = run.costs(2 * window)
                steps = rate / (BATCH * workers)
                result["ddp"] = {
                    "samples_per_second": rate,
                    "costs": costs,
                    "bytes_per_step": costs["with_other_workers_bytes_per_second"] / steps,
                }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at most; the cores when not given")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind (default: 3)")
    parser.add_argument("--window", type=float, default=6.0, help="seconds of a window (default: 6)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.workers, options.rounds, options.window)
    if options.json:
        print(json.dumps(result))
        return
    print(f"blocks of {LAYERS} layers of width 128, a step of {BATCH} samples; {os.cpu_count()} cores\n")
    print("| | samples/s of all | of n times one | kB/s of a worker | of it with workers | kB/s of its node's Ray |")
    print("|---|---|---|---|---|---|")

    def kilobytes(costs: dict[str, float]) -> str:
        names = ("worker", "with_other_workers", "rest_of_node")
        return " | ".join(f"{costs[f'{name}_bytes_per_second'] / 1e3:,.2f}" for name in names)

    for count, found in result["blocks"].items():
        moved = kilobytes(result["blocks_costs"]) if int(count) == options.workers else " | | "
        print(
            f"| {count} block{'s' if int(count) > 1 else ''}, a worker each | {found['samples_per_second']:,.0f} |"
            f" {100 * found['efficiency']:.1f} % | {moved} |"
        )
    print(f"| end to end, one worker | {result['end_to_end_samples_per_second']:,.0f} | | | | |")
    beside = result["blocks_costs"]["cores_beside_training"]
    if "ddp" in result:
        ddp = result["ddp"]
        one = ddp["samples_per_second"] / (options.workers * result["end_to_end_samples_per_second"])
        rate, moved = ddp["samples_per_second"], kilobytes(ddp["costs"])
        print(f"| end to end, DDP on {options.workers} | {rate:,.0f} | {100 * one:.1f} % | {moved} |")
        print(f"\nDDP: {ddp['bytes_per_step'] / 1e6:.2f} MB a step and worker, sent and received")
    print(f"Ray's own processes and the driver, beside the blocks' workers: {beside:.2f} cores")


if __name__ == "__main__":
    main()
