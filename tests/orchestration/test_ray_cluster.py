from __future__ import annotations

import socket
import time

import pytest

from dbtrain.errors import UserError
from dbtrain.orchestration.ray_cluster import connect, ray


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
