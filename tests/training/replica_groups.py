"""Starting the replicas of a block as processes, and hearing what they say."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from replica_process import main

from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory
from dbtrain.training.seat import Seat

FamilyConfig = Callable[..., RunConfig]
Start = Callable[..., "list[Replica]"]


# Processes that begin with everything loaded: loading takes seconds, and there are many of them.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dbtrain.orchestration.session", "dbtrain.training.replicas"])


class Replica:
    """A process of `replica_process.main`."""

    def __init__(self, run: RunDirectory, attempt: int, seat: Seat, stop_at: int, poisoned: tuple[int, ...]):
        self._told, ours = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=main, args=(run.uri, attempt, seat, stop_at, poisoned, ours))
        self.process.start()
        ours.close()

    def next(self) -> dict[str, Any]:
        """The next it tells; EOFError if it died."""
        told: dict[str, Any] = self._told.recv()
        return told

    def wait_for(self, step: int) -> None:
        """Return once it has reported that step."""
        while self.next()["step"] < step:
            pass

    def outcome(self) -> tuple[str, int, str]:
        """Kind, step and reason of its end."""
        told = self.next()
        while "kind" not in told:
            told = self.next()
        return told["kind"], told["step"], told["reason"]


def replicated(family_config: FamilyConfig, family: str, **sections: dict[str, Any]) -> RunConfig:
    """A short run for two replicas, without dropout, which differs by replica."""
    merged: dict[str, Any] = {
        "model": {"dropout": 0.0} if family == "vit" else {},
        "training": {"steps": 12},
        "checkpoints": {"every": 4},
        "logging": {"every": 1},
        "resources": {"replicas": 2},
    }
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    return family_config(family, **merged)


def finish(group: list[Replica]) -> None:
    """Let them train to the end."""
    ends = [replica.outcome() for replica in group]
    assert [(kind, reason) for kind, _, reason in ends] == [("finished", "")] * len(group)


def losses(run: RunDirectory) -> list[float]:
    """Of block 0, by step; each was told once."""
    lines = run.block(0).metrics()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
