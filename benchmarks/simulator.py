"""What failures cost a run of 1,000 blocks on 100 nodes, beside a synchronous job under the same failures.

    python benchmarks/simulator.py [--days 14] [--times 1 10 100] [--spares 0 5] [--seed 0] [--json]

Time is simulated; the coordinator is the real one. Both runs need 1,000 workers and have the same nodes, spare ones
among them, which fail at the same moments and are repaired in the same time. Blocks wait for room one by one; the
synchronous job goes on when it has all of its workers again, from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace

from simulated_cluster import WORKERS_OF_A_NODE, Cluster, Outcome, Setting, draw, synchronous


def line(name: str, outcome: Outcome) -> str:
    """One line of the table."""
    days = f"{outcome.wall_days:6.2f}" if outcome.finished else f"> {outcome.wall_days:.0f}"
    over = f"{outcome.over_ideal:.2%}" if outcome.finished else "given up"
    return (
        f"{name:<22} {outcome.failures:8,}  {days:>6}  {over:>10}  {outcome.utilisation:11.2%}  "
        f"{outcome.restarts:15,}  {outcome.recomputed:10.3%}"
    )


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=Setting.days, help="of the run without failures (default: 14)")
    parser.add_argument("--times", type=float, nargs="+", default=[1, 10, 100], help="multiples of the published rate")
    parser.add_argument("--spares", type=int, nargs="+", default=[0, 5], help="nodes more than needed (default: 0 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn failures (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    setting = Setting(days=options.days)
    start, results = time.process_time(), []
    for spares in options.spares:
        for times in options.times:
            world = replace(setting, spares=spares)
            blocks = Cluster(world, draw(world, times, options.seed)).run()
            together = synchronous(world, draw(world, times, options.seed))
            results.append((spares, times, blocks, together))
    seconds, events = time.process_time() - start, sum(blocks.events for _, _, blocks, _ in results)
    if options.json:
        rows = [
            {"spares": spares, "times": times, "blocks": asdict(blocks), "synchronous": asdict(together)}
            for spares, times, blocks, together in results
        ]
        print(json.dumps({"setting": asdict(setting), "seed": options.seed, "seconds": seconds, "rows": rows}))
        return
    print(
        f"{setting.workers:,} blocks of {setting.steps:,} steps of {setting.step:g} s, {setting.ideal / 86400:.2f} "
        f"days without failures, on {setting.nodes} nodes of {WORKERS_OF_A_NODE} workers\na checkpoint every "
        f"{setting.checkpoint_steps:,} steps; a node that failed is away for {setting.repair / 3600:g} h; "
        f"seed {options.seed}"
    )
    for spares in options.spares:
        print(f"\n{spares} spare nodes         failures    days  over ideal  utilisation  worker restarts  recomputed")
        for of, times, blocks, together in results:
            if of == spares:
                print(line(f"x{times:g} blocks", blocks))
                print(line(f"x{times:g} synchronous", together))
    print(f"\n{events:,} events of the coordinator, {seconds:.1f} s of one core")


if __name__ == "__main__":
    main()
