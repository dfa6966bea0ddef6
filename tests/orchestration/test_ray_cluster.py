from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import ray

from dbtrain.errors import UserError
from dbtrain.orchestration.ray_cluster import connect


@pytest.mark.parametrize(
    ("address", "problem"),
    [("ray://127.0.0.1:10001", "Ray Client"), ("nonsense", "cannot join")],
)
def test_addresses_that_cannot_be_joined(address: str, problem: str) -> None:
    assert not ray.is_initialized()
    with pytest.raises(UserError, match=problem) as caught:
        connect(address)
    assert caught.value.field == "--address"


def test_an_address_where_nobody_listens_is_refused_quickly() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    since = time.monotonic()
    with pytest.raises(UserError, match="nobody answers there"):
        connect(f"127.0.0.1:{port}")
    assert time.monotonic() - since < 10.0  # Ray alone tries for minutes


@pytest.mark.parametrize("first", ["ray_cluster", "ray_metrics", "ray_jobs", "ray_worker"])
def test_what_the_coordinator_tells_ray_does_not_print(first: str) -> None:
    """Standard output belongs to the result, whichever of our modules brings Ray in."""
    program = f"""
import dbtrain.orchestration.{first}
from ray._private.worker import print_to_stdstream
said = "A worker died or was killed while executing a task by an unexpected system error."
print_to_stdstream({{"lines": [said], "pid": "raylet", "is_err": False}}, ignore_prefix=False)
print("done")
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "done\n"
