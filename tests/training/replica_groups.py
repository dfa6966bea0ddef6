"""Starting the replicas of a block as processes, and hearing what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory

FamilyConfig = Callable[..., RunConfig]
Start = Callable[..., "list[Replica]"]


class Replica:
    """A process of `replica_process.py`."""

    def __init__(self, arguments: dict[str, Any], log: Path):
        command = [sys.executable, str(Path(__file__).with_name("replica_process.py")), json.dumps(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def next(self) -> dict[str, Any]:
        """The next line it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()[-3000:]
        told: dict[str, Any] = json.loads(line)
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
