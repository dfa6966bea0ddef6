"""One replica of a block in a process of its own, as a worker of a cluster would be, for test_replicas.py.

Reads a JSON object of arguments from the command line; prints each report, and at the end the outcome, as lines of
JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from dbtrain.orchestration.session import BlockSession, Outcome
from dbtrain.training.seat import Seat


def main() -> None:
    arguments = json.loads(sys.argv[1])
    session = BlockSession(arguments["run"], 0, arguments["attempt"], Seat(**arguments["seat"]))
    while not isinstance(report := session.advance(), Outcome):
        print(json.dumps({"step": report.step, "loss": report.loss}), flush=True)
        if report.step == arguments["stop_at"]:
            session.request_stop()
    print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
