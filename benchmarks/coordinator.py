"""How many events a second the coordinator takes on one core.

    python benchmarks/coordinator.py [--blocks 1000] [--events 100000] [--json]

Blocks take turns on nine tenths of the workers they would need, so that room is given all the time. Of the events, 97 %
are progress and 1 % ticks of the clock; the rest are workers that start, die, or have done their time slice. The events
are drawn first, against the coordinator itself, and then replayed from the same first state. The time is that of the
processor, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence

from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import (
    Action,
    Event,
    Node,
    StartWorker,
    Tick,
    WorkerDied,
    WorkerProgress,
    WorkerStarted,
    WorkerStopped,
)
from dbtrain.orchestration.state import BlockStatus, CoordinatorState, Policy, initial_state

SLOTS_OF_A_NODE = 9
SLICE_STEPS = 1000
SECONDS_OF_AN_EVENT = 0.01
"""Of the drawn clock: 1,000 workers that tell something every 10 s."""
PROGRESS, TICKS, DEATHS = 0.97, 0.01, 0.005
"""Shares of the events; what is left are time slices that end. Each worker that leaves brings one that starts."""


def first_state(blocks: int) -> CoordinatorState:
    """A run before its first event, on nodes for nine tenths of its blocks."""
    nodes = [Node(f"node-{number}", SLOTS_OF_A_NODE) for number in range(max(1, blocks // 10))]
    # The budget is not to be spent: the benchmark wants blocks that go on dying.
    policy = Policy(max_restarts=1_000_000, slice_steps=SLICE_STEPS)
    return initial_state([BlockStatus(index) for index in range(blocks)], nodes=nodes, policy=policy)


def draw(state: CoordinatorState, events: int, seed: int) -> list[Event]:
    """Events as the workers of a long run send them, each of a live attempt."""
    draws = random.Random(seed)
    drawn: list[Event] = []
    starting: list[StartWorker] = []
    running: list[StartWorker] = []

    def feed(event: Event) -> None:
        nonlocal state
        actions: Sequence[Action]
        state, actions = step(state, event)
        drawn.append(event)
        starting.extend(action for action in actions if isinstance(action, StartWorker))

    feed(Tick(0.0))
    while len(drawn) < events:
        now = len(drawn) * SECONDS_OF_AN_EVENT
        if starting:
            order = starting.pop()
            node = draws.choice(state.nodes).id
            feed(WorkerStarted(now, order.block, order.attempt, 4711, "10.0.0.1", "cuda:0", node))
            running.append(order)
            continue
        kind = draws.random()
        if kind < TICKS:
            feed(Tick(now))
            # The slowest of the workers just drawn may have been silent for too long, and are gone.
            running = [order for order in running if state.blocks[order.block].attempt == order.attempt]
            continue
        place = draws.randrange(len(running))
        order = running[place]
        block = state.blocks[order.block]
        if kind < TICKS + PROGRESS:
            at = min(block.step + 50, order.until or block.step + 50)
            feed(WorkerProgress(now, order.block, order.attempt, at, 0.5, 1000.0, at - at % 500))
            continue
        running[place] = running[-1]
        del running[-1]
        if kind < TICKS + PROGRESS + DEATHS:
            feed(WorkerDied(now, order.block, order.attempt, "killed", block.node_id))
        else:
            feed(WorkerStopped(now, order.block, order.attempt, order.until or block.step))
    return drawn


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1000, help="blocks of the run (default: 1000)")
    parser.add_argument("--events", type=int, default=100_000, help="events replayed (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn events (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    first = first_state(options.blocks)
    events = draw(first, options.events, options.seed)
    counts: dict[str, int] = {}
    for event in events:
        counts[type(event).__name__] = counts.get(type(event).__name__, 0) + 1
    state, start = first, time.process_time()
    for event in events:
        state, _ = step(state, event)
    seconds = time.process_time() - start
    rate = len(events) / seconds
    if options.json:
        print(json.dumps({"blocks": options.blocks, "events": counts, "events_per_second": rate}))
        return
    print(f"{options.blocks:,} blocks, {len(events):,} events in {seconds:.2f} s of one core: {rate:,.0f} events/s")
    print(", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1])))


if __name__ == "__main__":
    main()
