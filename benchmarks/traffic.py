"""Bytes that processes exchange over TCP, by the kernel's own count of every connection (`ss` of iproute2)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

_OWNER = re.compile(r"pid=(\d+)")
_BYTES = re.compile(r"\bbytes_(?:sent|received):(\d+)")


@dataclass(frozen=True)
class Connection:
    """One end of a TCP connection."""

    local: str
    peer: str
    """Address and port."""
    pids: frozenset[int]
    """Processes that hold this end."""
    bytes: int
    """Sent and received since it was opened."""


def connections() -> dict[tuple[str, str], Connection]:
    """All that are established on this machine, by (local, peer).

    Raises:
        FileNotFoundError: there is no `ss`.
    """
    command = ["ss", "--tcp", "--info", "--numeric", "--processes", "--oneline", "--no-header"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for line in listed.splitlines():
        words = line.split()
        if not words or words[0] != "ESTAB":
            continue
        local, peer = (address.replace("[::ffff:", "").replace("]", "") for address in words[3:5])
        pids = frozenset(int(pid) for pid in _OWNER.findall(line))
        found[local, peer] = Connection(local, peer, pids, sum(int(count) for count in _BYTES.findall(line)))
    return found


def exchanged(
    before: dict[tuple[str, str], Connection],
    after: dict[tuple[str, str], Connection],
    ours: Collection[int],
    theirs: Collection[int] | None = None,
) -> int:
    """Bytes that the processes `ours` sent and received between two looks; those to and from `theirs` alone if given.

    Of connections that were closed in between nothing is known.
    """
    total = 0
    for key, one in after.items():
        other = after.get((one.peer, one.local))
        if one.pids.isdisjoint(ours) or (theirs is not None and (other is None or other.pids.isdisjoint(theirs))):
            continue
        total += one.bytes - (before[key].bytes if key in before else 0)
    return total
