"""The faults of `chaos.py`: each does something bad to a run and says whom it hits."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos_checks import Fault
from disturbed_run import DisturbedRun, gone, kill_and_wait, now, step_of
from local_cluster import LocalCluster, LocalNode, wait_for

WHO = re.compile(r"^dbtrain run .* block (\d+) attempt (\d+) ", re.MULTILINE)
"""The first line of a worker's output."""
PATIENCE = 120.0
"""Seconds that anything may take which should take a few."""


@dataclass
class Chaos:
    """A run on a cluster, and the dice."""

    run: DisturbedRun
    cluster: LocalCluster
    cpus: float
    """Of each node."""
    dice: random.Random
    damaged: set[tuple[Path, int]] = field(default_factory=set)
    """Checkpoints that were damaged, with their inodes: another folder of that name is a new one."""

    def intact(self, block: int) -> list[Path]:
        """Checkpoints that nobody has damaged, oldest first."""
        return [path for path in self.run.checkpoints(block) if (path, _inode(path)) not in self.damaged]

    def fault(self, kind: str, block: int | None, attempts: dict[int, int], note: str = "") -> Fault:
        """The record of a fault that is about to happen to the given attempts of blocks."""
        self.run.look()
        fault = Fault(0, kind, block, now(), {}, note=note)
        self.also_hits(fault, attempts)
        return fault

    def also_hits(self, fault: Fault, attempts: dict[int, int]) -> None:
        """Add attempts of blocks to a fault, where it has none of theirs yet."""
        for hit, attempt in attempts.items():
            if hit not in fault.attempts:
                intact = self.intact(hit)
                fault.attempts[hit] = attempt
                fault.durable[hit] = step_of(intact[-1]) if intact else 0
                fault.steps[hit] = self.run.blocks[hit].step

    def running(self, block: int) -> dict[int, int]:
        """The block and its attempt that runs."""
        return {block: self.run.blocks[block].attempt}

    def driver_fault(self, kind: str, end: Callable[[], str]) -> Fault:
        """A fault of the driver, which takes all its workers along; its command is started again."""
        fault = self.fault(kind, None, dict.fromkeys(self.run.unfinished(), 0))
        fault.note = end()
        self.run.look()
        # Now that it is dead it asks for no more workers.
        fault.attempts = {block: self.run.blocks[block].asked for block in fault.attempts}
        return fault

    def victim(self, block: int) -> int:
        """Process of the block's worker."""
        pid = self.run.blocks[block].pid
        assert pid is not None
        return pid

    def other_node(self, block: int) -> LocalNode:
        """The node of the block's worker, or any other that is not the head, which the cluster cannot do without."""
        nodes = [node for node in self.cluster.nodes[1:] if node.alive()]
        return next((node for node in nodes if block in self.on(node)), None) or self.dice.choice(nodes)

    def on(self, node: LocalNode) -> dict[int, int]:
        """Blocks that have a worker on a node, and the attempt; those that have only just started as well."""
        found: dict[int, int] = {}
        for pid, command in node.processes().items():
            if command.startswith("ray::") and (who := WHO.search(worker_output(self.cluster, pid))):
                found[int(who[1])] = int(who[2])
        return found


def kill_worker(chaos: Chaos, block: int) -> Fault:
    """SIGKILL a worker."""
    pid = chaos.victim(block)
    fault = chaos.fault("kill worker", block, chaos.running(block))
    kill_and_wait(pid)
    return fault


def freeze_worker(chaos: Chaos, block: int) -> Fault:
    """SIGSTOP a worker; the coordinator finds that it does not answer, and has it killed."""
    pid = chaos.victim(block)
    fault = chaos.fault("freeze worker", block, chaos.running(block))
    os.kill(pid, signal.SIGSTOP)
    return fault


def kill_node(chaos: Chaos, block: int) -> Fault:
    """SIGKILL a raylet, not the head's; a new node joins."""
    node = chaos.other_node(block)
    hits = chaos.on(node)
    fault = chaos.fault("kill node", block if block in hits else None, hits)
    node.kill_raylet()
    node.wait_until_gone()
    chaos.cluster.add_node(chaos.cpus)
    return fault


def kill_driver(chaos: Chaos, block: int) -> Fault:
    """SIGKILL the driver; its command is started again."""
    fault = chaos.driver_fault("kill driver", chaos.run.kill_driver)
    chaos.run.start_driver()
    return fault


def stop_driver(chaos: Chaos, block: int) -> Fault:
    """SIGTERM the driver, which has every worker save and leave; its command is started again."""
    fault = chaos.driver_fault("stop driver", chaos.run.stop_driver)
    # (A worker that is frozen or dead at that moment cannot save: then another fault is to blame.)
    fault.graceful = True
    chaos.run.start_driver()
    return fault


def damage_checkpoint(chaos: Chaos, block: int) -> Fault:
    """Cut off or flip a bit in a file of the newest checkpoint, and SIGKILL the worker."""
    pid = chaos.victim(block)
    os.kill(pid, signal.SIGSTOP)  # it shall not write a newer one meanwhile
    newest = chaos.intact(block)[-1]
    path = chaos.dice.choice(sorted(newest.iterdir()))
    data = bytearray(path.read_bytes())
    if chaos.dice.random() < 0.5:
        note = f"{newest.name}/{path.name} cut"
        data = data[: chaos.dice.randrange(len(data))]
    else:
        note = f"{newest.name}/{path.name} flipped"
        data[chaos.dice.randrange(len(data))] ^= 1 << chaos.dice.randrange(8)
    path.write_bytes(data)
    chaos.damaged.add((newest, _inode(newest)))
    fault = chaos.fault("damage checkpoint", block, chaos.running(block), note)
    fault.damaged = 1
    kill_and_wait(pid)
    return fault


def tear_metrics(chaos: Chaos, block: int) -> Fault:
    """SIGKILL a worker in the middle of a line of its metrics."""
    fault = kill_worker(chaos, block)
    fault.kind = "tear metrics"
    chaos.run.look()
    chaos.run.metrics[block].tear()
    return fault


def tear_journal(chaos: Chaos, block: int) -> Fault:
    """SIGKILL the driver in the middle of a line of the journal; its command is started again."""
    fault = chaos.driver_fault("tear journal", chaos.run.kill_driver)
    chaos.run.events.tear()
    chaos.run.start_driver()
    return fault


def wake_late_writer(chaos: Chaos, block: int) -> Fault:
    """SIGSTOP a worker and its raylet, let the block be restarted elsewhere, and wake the worker alone.

    It trains on until it wants to save, and has to find that the block belongs to another.
    """
    node = chaos.other_node(block)
    hits = chaos.on(node)
    if not any(chaos.run.blocks[hit].attempt == attempt for hit, attempt in hits.items()):
        return kill_worker(chaos, block)  # nobody there has begun
    if block not in hits:
        block = next(hit for hit, attempt in hits.items() if chaos.run.blocks[hit].attempt == attempt)
    old, pid, raylet = chaos.run.blocks[block].attempt, chaos.victim(block), node.raylet()
    fault = chaos.fault("late writer", block, hits)
    os.kill(pid, signal.SIGSTOP)
    os.kill(raylet, signal.SIGSTOP)

    def replaced() -> bool:
        chaos.run.look()
        return bool(chaos.run.blocks[block].steps) and chaos.run.blocks[block].steps[-1][1] > old

    # Whoever was starting there had not said yet who it is.
    seen: dict[int, int] = {}

    def replaced_or_seen() -> bool:
        seen.update(chaos.on(node))
        return replaced()

    wait_for(replaced_or_seen, f"a new worker of block {block}", PATIENCE)
    chaos.also_hits(fault, seen)
    os.kill(pid, signal.SIGCONT)
    ended = f"dbtrain block {block}: "

    def refused() -> bool:
        return gone(pid) or ended in worker_output(chaos.cluster, pid)

    wait_for(refused, f"the late writer, process {pid}, to give up", PATIENCE)
    last = next((line for line in worker_output(chaos.cluster, pid).splitlines() if line.startswith(ended)), "gone")
    fault.note = f"it said: {last.removeprefix(ended)}"
    os.kill(raylet, signal.SIGCONT)  # and finds that it has been declared dead
    node.wait_until_gone(seconds=PATIENCE)
    chaos.cluster.add_node(chaos.cpus)
    return fault


FAULTS: dict[Callable[[Chaos, int], Fault], int] = {
    kill_worker: 6,
    freeze_worker: 3,
    kill_node: 3,
    kill_driver: 3,
    stop_driver: 2,
    damage_checkpoint: 5,
    tear_metrics: 2,
    tear_journal: 2,
    wake_late_writer: 1,
}
"""Faults and their weights in the draw."""


def worker_output(cluster: LocalCluster, pid: int) -> str:
    """What a worker has printed."""
    return "".join(path.read_text() for path in cluster.folder.glob(f"*/session_*/logs/worker-*-{pid}.out"))


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0  # pruned meanwhile
