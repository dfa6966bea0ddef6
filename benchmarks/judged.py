"""How an independent end-to-end network judges what runs write: bits per byte of their texts, and how varied these are.

    python benchmarks/judged.py --judge runs/baseline-seed1 runs/blocks-seed0 runs/baseline-seed0 [--texts 96] [--json]

Every run goes on from the first quarter of the same held-out windows, sampled at temperature 1 as its recipe's chain
says; the judge scores what was written, and what stands there. A judge that is none of the runs favours none of them. A
model that repeats itself may please the judge: the part of different runs of four tokens tells.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import table

from dbtrain.data.shards import ShardSet
from dbtrain.inference.bits import judged
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.runs import model_of
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import Storage


def main() -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="finished runs of causal or recurrent language models")
    parser.add_argument("--judge", required=True, help="a finished end-to-end run on the same data")
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    opened = RunDirectory.open(Storage.open(arguments.judge))
    judge = TextGenerator(model_of(opened))
    assert opened.config.data.path is not None
    shards = ShardSet.open(Path(opened.config.data.path), "test")
    rows = []
    for path in arguments.runs:
        generator = TextGenerator(model_of(RunDirectory.open(Storage.open(path))))
        rows.append({"run": Path(path).name, **judged(generator, judge, shards, arguments.texts)})
    figures = {"judge": Path(arguments.judge).name, "texts": arguments.texts, "rows": rows}
    print(json.dumps(figures) if arguments.json else table(figures))


if __name__ == "__main__":
    main()
