"""One replica of a block in a process of its own, as a worker of a cluster would be, for test_replicas*.py.

Reads a JSON object of arguments from the command line; prints each report, and at the end the outcome, as lines of
JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from torch import Tensor

from dbtrain.data.loader import BatchLoader
from dbtrain.orchestration.session import BlockSession, Outcome
from dbtrain.training.seat import Seat


def main() -> None:
    arguments = json.loads(sys.argv[1])
    seat = Seat(**arguments["seat"])
    last = seat.replica == seat.replicas - 1
    if last:
        _poison(arguments["poisoned"])
    session = BlockSession(arguments["run"], 0, arguments["attempt"], seat)
    while not isinstance(report := session.advance(), Outcome):
        print(json.dumps({"step": report.step, "loss": report.loss}), flush=True)
        if last and report.step == arguments["stop_at"]:
            session.request_stop()
    print(json.dumps(asdict(report)), flush=True)
    # As a worker is ended: at once. A process group that lost a member would hold up an ordinary exit.
    os._exit(0)


def _poison(steps: list[int]) -> None:
    """Put a NaN into this replica's images of some steps."""
    read = BatchLoader.batch

    def batch(self: BatchLoader, step: int) -> dict[str, Tensor]:
        found = read(self, step)
        if step in steps:
            found["image"][0] = float("nan")
        return found

    BatchLoader.batch = batch  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
