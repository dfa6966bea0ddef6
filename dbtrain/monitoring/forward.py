"""A process that forwards what a run tells to W&B or TensorBoard: `python -m dbtrain.monitoring.forward NAME RUN`.

It follows the run directory until its standard input ends, which is how it hears that the driver has ended, however
that came about. Whatever happens here, training notices nothing of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dbtrain.errors import UserError
from dbtrain.monitoring.lines import LineFollower
from dbtrain.monitoring.run_view import RunReader, RunView
from dbtrain.monitoring.sinks import FOLDER
from dbtrain.run_directory import METRICS, RunDirectory

POLL_SECONDS = 2.0
"""Between two looks at the run directory."""
_NICENESS = 10
_GIVEN_UP = 3  # exit code


class Sink(Protocol):
    """Takes the figures of blocks. Whatever it raises ends this process."""

    def log(self, block: int, step: int, when: float, values: Mapping[str, float]) -> None:
        """Figures of a block at a step, told at `when` (seconds since 1970). A block's steps rise strictly."""
        ...

    def flush(self) -> None:
        """Nothing more will come for some seconds."""
        ...

    def close(self, view: RunView) -> None:
        """The run has ended, and how."""
        ...


@dataclass
class Memory:
    """What has to outlive this process, so that a run that goes on is told on, and nothing twice."""

    path: str
    """Below the run directory."""
    id: str = field(default_factory=lambda: secrets.token_hex(5))
    """Of this run directory among all others: one that is made anew, of the same configuration, is another run."""
    sent: dict[int, int] = field(default_factory=dict)
    """Highest step by block."""

    @classmethod
    def load(cls, run: RunDirectory, name: str) -> Memory:
        """What was kept under `name`; a new one, kept at once, if there is none."""
        memory = cls(f"{FOLDER}/{name}.json")
        try:
            kept = json.loads(run.storage.read_bytes(memory.path))
            memory.id, memory.sent = str(kept["id"]), {int(block): int(step) for block, step in kept["sent"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            memory.save(run)
        return memory

    def save(self, run: RunDirectory) -> None:
        """Keep it. Raises UserError where the run directory cannot be written."""
        run.storage.write_atomic(self.path, json.dumps({"id": self.id, "sent": self.sent}).encode())


def forward(run: RunDirectory, sink: Sink, memory: Memory, ended: threading.Event) -> None:
    """Give `sink` every line of every block's metrics once, up to those that are there when `ended` is set.

    A block that lost its worker repeats steps: what was told of them before stands.
    """
    followers = [LineFollower(run.block(b.index).storage, METRICS) for b in run.plan.blocks]
    over = False
    while not over:
        over = ended.wait(POLL_SECONDS)
        news = False
        for block, follower in enumerate(followers):
            for line in follower.read():
                step = line.get("step")
                if "event" in line or not isinstance(step, int) or step <= memory.sent.get(block, 0):
                    continue
                sink.log(block, step, float(line.get("time", time.time())), _figures(line))
                memory.sent[block] = step
                news = True
        if news:
            sink.flush()
            memory.save(run)
    sink.close(RunReader(run).read())


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, by name; JSON's null stands for NaN and infinity."""
    return {
        name: math.nan if value is None else value
        for name, value in line.items()
        if name not in ("time", "step") and (value is None or isinstance(value, int | float))
    }


def main(arguments: Sequence[str]) -> int:
    """Forward to the sink of that name, see `SinkName`; the exit code is 0 if all went well."""
    name, uri = arguments[:2]
    patience = float(arguments[2]) if len(arguments) > 2 else math.inf
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(ended, patience), daemon=True).start()
    with contextlib.suppress(OSError):
        # The one of an earlier driver that was killed may still be finishing.
        fcntl.flock(sys.stdout.fileno(), fcntl.LOCK_EX)
    try:
        run = RunDirectory.open(uri)
        if name == "tensorboard":
            from dbtrain.monitoring.tensorboard_sink import TensorBoardSink

            forward(run, TensorBoardSink(run), Memory.load(run, name), ended)
            return 0
        from dbtrain.monitoring.wandb_sink import WandbSink, log_assembly

        memory = Memory.load(run, "wandb")
        if name == "assembly":
            log_assembly(run, memory.id)
        else:
            forward(run, WandbSink(run, memory.id), memory, ended)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _await_end(ended: threading.Event, patience: float) -> None:
    """Wait for the driver's end, then end this process if it takes too long: there may be nobody else to do so."""
    # Not through sys.stdin, whose lock would be in the way of an exit before the driver's.
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    ended.set()
    if math.isfinite(patience):
        time.sleep(patience + POLL_SECONDS)
        print(f"not everything was sent within {patience:g} s", file=sys.stderr, flush=True)
        os._exit(_GIVEN_UP)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
