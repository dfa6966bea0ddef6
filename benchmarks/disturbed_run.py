"""A real `dbtrain train` of four small blocks on a local cluster, watched through its run directory alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from local_cluster import wait_for

BLOCKS = 4
DBTRAIN = (str(Path(sys.executable).with_name("dbtrain")),)  # the command itself, of this environment
STOP_SECONDS = 120.0


def small_run(folder: Path, steps: int, every: int, seed: int = 1, **resources: Any) -> Path:
    """Write the configuration of a run of four one-layer blocks on 8x8 digits; returns its path.

    Args:
        folder: where the file goes, and the prepared digits beside it.
        steps: optimiser steps of each block.
        every: steps between checkpoints. Every single step is told in the metrics.
        seed: of the run.
        resources: fields of the section `resources`.
    """
    config = {
        "name": "disturbed",
        "seed": seed,
        "model": {
            "family": "vit",
            "image_size": 8,
            "channels": 1,
            "num_classes": 10,
            "patch_size": 4,
            "depth": BLOCKS,
            "width": 16,
            "heads": 2,
            "mlp_width": 32,
            "dropout": 0.1,
        },
        "data": {"source": "digits", "path": str(folder / "digits"), "augment": {"crop_padding": 1}},
        "blocks": {"count": BLOCKS},
        "training": {"steps": steps, "batch_size": 16},
        "ema": {"half_life": 200},
        "checkpoints": {"every": every, "keep": 3},
        "logging": {"every": 1},
        "resources": {"cpus": 1, "threads": 1, **resources},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start_undisturbed(config: Path, run: Path) -> subprocess.Popen[bytes]:
    """Start training the run in one process, block after block, behind everybody else."""
    command = ["nice", "-n", "5", *DBTRAIN, "train", str(config), "--run", str(run), "--backend", "inline", "--json"]
    # Neither touches the bytes, and nobody reads them here.
    command += ["--set", "logging.every=1000", "--set", "checkpoints.every=1000"]
    with run.with_suffix(".err").open("wb") as err:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment)


@contextlib.contextmanager
def closing_process(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process that is gone at the end, however the end comes."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


def assembled_digest(run: Path) -> str:
    """SHA-256 of the assembled model."""
    made = subprocess.run([*DBTRAIN, "assemble", str(run), "--json"], check=True, capture_output=True, text=True)
    digest: str = json.loads(made.stdout)["sha256"]
    return digest


class Tail:
    """Lines of a growing JSONL file, each once, also those that are torn off afterwards."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """New whole lines; what is no JSON object is passed over, as the run directory's own readers do."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record

    def tear(self) -> None:
        """Cut the file in the middle of its last line, as a dying writer may leave it. Nobody may be writing."""
        data = self.path.read_bytes()
        start = data.rstrip(b"\n").rfind(b"\n") + 1
        os.truncate(self.path, start + (len(data) - start) // 2)
        self._offset = self.path.stat().st_size  # the rest of that line is never finished


@dataclass
class BlockView:
    """What the run directory has told of one block."""

    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """Time (seconds since 1970), attempt and step of every line of its metrics, in the order of the file."""
    pid: int | None = None
    """Process of its worker, while the journal says that it runs."""
    attempt: int = 0
    """Newest attempt that the journal knows as running."""
    asked: int = 0
    """Newest attempt for which the journal says that a worker was asked for."""
    state: str = "pending"

    @property
    def step(self) -> int:
        """The newest step."""
        return self.steps[-1][2] if self.steps else 0

    @property
    def highest(self) -> int:
        """The highest step."""
        return max((step for _, _, step in self.steps), default=0)

    def made(self, since: int) -> int:
        """Steps that the worker which runs now has told behind the first `since` lines; 0 if none runs."""
        return 0 if self.pid is None else sum(attempt == self.attempt for _, attempt, _ in self.steps[since:])


class DisturbedRun:
    """One run directory and its drivers, one after the other."""

    def __init__(self, folder: Path, config: Path, address: str, environment: dict[str, str]):
        self.folder = folder
        self.path = folder / "run"
        self.config = config
        self.address = address
        self.environment = environment
        self.blocks = [BlockView() for _ in range(BLOCKS)]
        self.journal: list[dict[str, Any]] = []
        """All lines of events.jsonl."""
        self.driver: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.events = Tail(self.path / "events.jsonl")
        self.metrics = [Tail(self.path / f"blocks/{index:02d}/metrics.jsonl") for index in range(BLOCKS)]

    def start_driver(self, wrap: tuple[str, ...] = ()) -> None:
        """Start the training command, always the same one."""
        command = [*DBTRAIN, "train", str(self.config), "--run", str(self.path), "--address", self.address, "--json"]
        self.starts += 1
        self.look()
        for block in self.blocks:
            block.pid = None  # the workers of the driver before are gone, or as good as that
        with self.output().open("wb") as out, self.errors().open("wb") as err:
            self.driver = subprocess.Popen(
                [*wrap, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment,
                start_new_session=True,
            )

    def output(self) -> Path:
        """Standard output of the newest driver."""
        return self.folder / f"driver-{self.starts}.out"

    def errors(self) -> Path:
        """Standard error of the newest driver."""
        return self.folder / f"driver-{self.starts}.err"

    def driver_pid(self) -> int:
        """Process id of the driver that runs."""
        assert self.driver is not None
        assert self.driver.poll() is None, f"the driver ended with {self.driver.returncode}: {self.last_words()}"
        return self.driver.pid

    def kill_driver(self) -> str:
        """SIGKILL the driver; returns nothing to say."""
        os.kill(self.driver_pid(), signal.SIGKILL)
        assert self.driver is not None
        self.driver.wait()
        return ""

    def stop_driver(self) -> str:
        """SIGTERM the driver, and wait for it; returns what it ends with."""
        os.kill(self.driver_pid(), signal.SIGTERM)
        assert self.driver is not None
        return f"exit code {self.driver.wait(STOP_SECONDS)}"

    def close(self) -> None:
        """SIGKILL the driver if it is there."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()

    def last_words(self) -> str:
        """The end of the driver's standard error."""
        return self.errors().read_text()[-2000:]

    def look(self) -> None:
        """Read what the run directory has got since."""
        for line in self.events.read():
            self.journal.append(line)
            if "block" in line:
                self._hear(line)
        for block, tail in zip(self.blocks, self.metrics, strict=True):
            block.steps += [(line["time"], line["attempt"], line["step"]) for line in tail.read()]

    def _hear(self, line: dict[str, Any]) -> None:
        block = self.blocks[line["block"]]
        block.asked = max(block.asked, line["attempt"])
        match line["event"]:
            case "block_running":
                block.pid, block.attempt, block.state = line["pid"], line["attempt"], "running"
            case (
                "block_starting"
                | "block_restarting"
                | "block_finished"
                | "block_failed"
                | "block_stopped"
                | "block_paused" as name
            ):
                block.pid, block.state = None, name.removeprefix("block_")

    def done(self) -> bool:
        """Whether the driver has ended by itself."""
        return self.driver is not None and self.driver.poll() is not None

    def unfinished(self) -> list[int]:
        """Blocks with steps to go."""
        return [index for index, block in enumerate(self.blocks) if block.state != "finished"]

    def wait_until_running(self, index: int, steps: int, seconds: float) -> bool:
        """Wait until a worker of block `index` has made so many new steps; False when the block has ended before."""
        block = self.blocks[index]
        self.look()
        since = len(block.steps)

        def there() -> bool:
            self.look()
            return self.done() or block.state in ("finished", "failed") or block.made(since) >= steps

        wait_for(there, f"{steps} steps of block {index}", seconds, poll=0.02)
        return not self.done() and block.made(since) >= steps

    def checkpoints(self, index: int) -> list[Path]:
        """The block's checkpoints, oldest first."""
        return sorted((self.path / f"blocks/{index:02d}/checkpoints").glob("step-*"))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_and_wait(pid: int) -> None:
    """SIGKILL a process, if it is there, and wait until it writes no more."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid), f"process {pid} to go", 30.0, poll=0.01)


def now() -> float:
    """Seconds since 1970, as in journal and metrics."""
    return time.time()
