"""Two machines on one: network namespaces joined by a cable that can be cut. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A network namespace with a loopback of its own and one end of the cable."""

    name: str
    ip: str

    @property
    def wrap(self) -> tuple[str, ...]:
        """What stands before a command that shall run there."""
        return ("ip", "netns", "exec", self.name)


@dataclass(frozen=True)
class TwoMachines:
    """Two namespaces that see each other and nothing else."""

    first: Machine
    second: Machine
    cable: str
    """The first one's end."""

    def cut(self) -> None:
        """Let nothing through, in either direction. Connections stay open and hear nothing."""
        _ip("netns", "exec", self.first.name, "ip", "link", "set", self.cable, "down")

    def mend(self) -> None:
        """Let everything through again."""
        _ip("netns", "exec", self.first.name, "ip", "link", "set", self.cable, "up")


def why_not() -> str | None:
    """Why this machine cannot have namespaces; None if it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and the command ip of iproute2"
    name = f"dbt-{uuid.uuid4().hex[:8]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@contextlib.contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """Makes them, and removes them with the cable between them."""
    run = uuid.uuid4().hex[:6]
    first, second = Machine(f"dbt-{run}-a", "10.213.7.1"), Machine(f"dbt-{run}-b", "10.213.7.2")
    ends = {first: f"dbt{run}a", second: f"dbt{run}b"}
    try:
        for machine in (first, second):
            _ip("netns", "add", machine.name)
        _ip("link", "add", ends[first], "netns", first.name, "type", "veth", "peer", ends[second], "netns", second.name)
        for machine, end in ends.items():
            _ip("-n", machine.name, "addr", "add", f"{machine.ip}/24", "dev", end)
            for device in ("lo", end):
                _ip("-n", machine.name, "link", "set", device, "up")
        yield TwoMachines(first, second, ends[first])
    finally:
        for machine in (first, second):
            subprocess.run(["ip", "netns", "del", machine.name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
