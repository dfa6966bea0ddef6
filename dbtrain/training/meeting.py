"""Where workers that have to talk find each other: a key-value store of PyTorch in the driver's process.

Only replicas of a block and averaged stems need it; a run without either never opens one. Like all of
torch.distributed it has no authentication: it belongs on a network that is trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
from collections.abc import Mapping
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore  # public as torch.distributed.TCPStore, but not to mypy

_LIVE = "live"

_SIOCGIFADDR = 0x8915


class MeetingPlace:
    """The store's server; it lives as long as this object."""

    def __init__(self, host: str):
        """Opens a free port; `host` is this machine's address as workers reach it."""
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.address = f"{host}:{self.store.port}"
        """What `join` takes."""
        self.tell_live({})

    def tell_live(self, attempts: Mapping[int, int]) -> None:
        """Keep the list of workers for whom others may wait: starting or running blocks, with their attempt."""
        self.store.set(_LIVE, json.dumps(list(attempts.items())))


def join(address: str, timeout: float) -> Store:
    """The store at host:port; waiting for a key there ends after `timeout` seconds."""
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout))


def live_blocks(store: Store) -> dict[int, int]:
    """The attempt at each block that has a worker, as the driver has last told."""
    return dict(json.loads(store.get(_LIVE)))


def choose_interface(host: str) -> None:
    """Have gloo and NCCL talk over the interface that leads to `host` (with or without a port), unless the user has
    chosen one.

    Left alone, gloo takes the address of the machine's name, which on many systems is that of the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host.rpartition(":")[0] or host, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                address = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
                if address == own:
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                    os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
                    return
