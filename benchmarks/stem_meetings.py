"""What one averaging of stems costs: seconds, and bytes that go through this machine's loopback.

    python benchmarks/stem_meetings.py --blocks 3 --parameters 20746 4241424 --meetings 20

Each block is a process with nothing but a stem of that many float32 parameters; all come at the same time, which
leaves agreeing and summing. Bytes are those of all blocks together, beside what a ring all-reduce sends:
2 (B - 1) times the stem's bytes. The kernel's counter also sees what other programs send meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbtrain.config import BlocksConfig
from dbtrain.training.averaging import StemAverager
from dbtrain.training.meeting import MeetingPlace

_SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
_SPAWN = multiprocessing.get_context("spawn")


def attend(index: int, address: str, parameters: int, meetings: int, start: Barrier, results: Any) -> None:
    """One block; the first meeting, which builds the group, is told apart."""
    torch.set_num_threads(1)
    module = nn.ModuleDict({"head": nn.Linear(parameters, 1, bias=False)})
    averager = StemAverager(BlocksConfig(stem="averaged", average_every=1), index, 1, address, module)
    seconds = []
    sent = 0
    for step in range(1, meetings + 2):
        start.wait()
        if step == 2:
            sent = int(_SENT.read_text())
        began = time.perf_counter()
        averager.after_step(step, meetings + 9, meetings + 9, lambda: False)
        seconds.append(time.perf_counter() - began)
    start.wait()
    results.put((index, seconds[0], seconds[1:], int(_SENT.read_text()) - sent))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--parameters", type=int, nargs="+", default=[20746, 4241424])
    parser.add_argument("--meetings", type=int, default=20)
    arguments = parser.parse_args()
    print("| parameters | first, ms | median, ms | slowest, ms | MB sent, counted | 2 (B - 1) stems, MB |")
    print("|---|---|---|---|---|---|")
    for parameters in arguments.parameters:
        place = MeetingPlace("127.0.0.1")
        place.tell_live(dict.fromkeys(range(arguments.blocks), 1))
        start, results = _SPAWN.Barrier(arguments.blocks), _SPAWN.Queue()
        shared = (place.address, parameters, arguments.meetings, start, results)
        blocks = [_SPAWN.Process(target=attend, args=(index, *shared)) for index in range(arguments.blocks)]
        for block in blocks:
            block.start()
        _, first, seconds, sent = min((results.get() for _ in blocks), key=lambda result: result[0])
        for block in blocks:
            block.join()
        planned = 2 * (arguments.blocks - 1) * 4 * parameters
        times = [1000 * value for value in (first, statistics.median(seconds), max(seconds))]
        megabytes = [value / 1e6 for value in (sent / arguments.meetings, planned)]
        print(
            f"| {parameters:,} | {' | '.join(f'{ms:.0f}' for ms in times)} "
            f"| {' | '.join(f'{value:.2f}' for value in megabytes)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
