"""Getting a Ray cluster: a private one on this machine, or one that is there already."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from dbtrain.errors import RunInterrupted, UserError
from dbtrain.orchestration.placement import Machine
from dbtrain.orchestration.submission import WORKER_PYTHON

_OBJECT_STORE_BYTES = 100 * 2**20  # nothing of size goes through it; Ray's least is 75 MiB
_CONNECT_TIMEOUT = 5.0  # seconds
HEAD_PATIENCE = 40.0
"""Seconds without an answer of the cluster's head; after 60 Ray ends this process, without a word to it."""
_PROBE_TIMEOUT = 2.0  # seconds
_LEAVE_TIMEOUT = 5.0  # seconds
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class Cluster:
    """A connection to a cluster."""

    def __init__(self, *, owned: bool, connected: bool, log_folder: str | None):
        """
        Args:
            owned: the cluster was started for this connection and ends with it.
            connected: this connection is ours to close.
            log_folder: where the workers' logs are on this machine, for a cluster of ours.
        """
        self.owned = owned
        self.log_folder = log_folder
        self._connected = connected
        self._head: str = ray.get_runtime_context().gcs_address
        self._silent_since: float | None = None
        self._machines: list[Machine] = []

    def machines(self) -> list[Machine]:
        """The nodes that are alive and all they have; those known last while the head does not answer.

        Raises:
            RunInterrupted: the head has not answered for long.
        """
        if self.head_answers():
            nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
            self._machines = [Machine(node["NodeID"], node["Resources"]) for node in nodes if node["Alive"]]
            return self._machines
        assert self._silent_since is not None
        if time.monotonic() - self._silent_since >= HEAD_PATIENCE:
            raise RunInterrupted(
                f"the head of the Ray cluster at {self._head} is gone; the same command goes on from the newest "
                "checkpoints, on that cluster once it is back or on another one"
            )
        return self._machines

    def head_answers(self) -> bool:
        """Whether the head takes connections; a call of Ray's would wait for it, and then end this process."""
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT).close()
        except OSError:
            self._silent_since = time.monotonic() if self._silent_since is None else self._silent_since
            return False
        self._silent_since = None
        return True

    def close(self) -> None:
        """Leave the cluster; one of ours ends."""
        if not self._connected:
            return
        if self._silent_since is None:
            ray.shutdown()
            return
        # Without a head Ray may wait for it in vain.
        leaving = threading.Thread(target=ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(_LEAVE_TIMEOUT)


def connect(address: str | None = None, cpus: int | None = None) -> Cluster:
    """Join the cluster at `address` (or at RAY_ADDRESS, which Ray sets in its jobs), or start a private one
    here, with all cores of this machine or `cpus` of them.

    In a process that is connected already, that connection is used and left open.

    Raises:
        UserError: there is no cluster at the address, or it does not let us in.
    """
    if ray.is_initialized():
        return Cluster(owned=False, connected=False, log_folder=None)
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None or address == "local":
        with _private_token(), _sigterm_handler_kept():
            context: Any = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        log_folder = str(Path(context.address_info["session_dir"]) / "logs")
        return Cluster(owned=True, connected=True, log_folder=log_folder)
    if "://" in address:
        raise UserError(
            "Ray Client addresses are not supported: a driver has to be on a node of the cluster",
            field="--address",
            value=address,
            mend="give host:port of the head's GCS, e.g. 10.0.0.1:6379, or auto",
        )
    _check_listening(address)
    try:
        with _sigterm_handler_kept():
            ray.init(address=address, runtime_env=_workers_env(), log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"cannot join a Ray cluster there: {' '.join(str(error).split())}",
            field="--address",
            value=address,
            mend="if the cluster wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
        ) from error
    return Cluster(owned=False, connected=True, log_folder=None)


def _workers_env() -> dict[str, str] | None:
    """What the job that we may be in is to have beside its own environment."""
    # Not told to Ray's job server: it would start its own part of the job with an interpreter that may not have Ray,
    # and wait for that for a quarter of an hour.
    python = os.environ.get(WORKER_PYTHON)
    return None if python is None else {"py_executable": python}


def _check_listening(address: str) -> None:
    """Ray itself tries an address where nobody listens for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # "auto", or something that Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"nobody answers there: {error}",
            field="--address",
            value=address,
            mend="give host:port of the head's GCS, as printed by `ray start --head`",
        ) from None


@contextlib.contextmanager
def _private_token() -> Iterator[None]:
    """Unless the user has set up authentication, give the cluster's processes a token of their own.

    Ray would write one to ~/.ray/auth_token, which fails where HOME is read-only, and two runs that start at
    once could overwrite each other's.
    """
    if any(name in os.environ for name in _TOKEN_VARIABLES):
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = _token()
    # Ray turns authentication on by itself (RAY_AUTH_MODE would be read too late here) and warns of it.
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in _TOKEN_VARIABLES:
            os.environ.pop(name, None)


@functools.cache
def _token() -> str:
    """One token a process, because Ray remembers the first one it has read."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """`ray.init` puts in a SIGTERM handler that exits; whoever was there first comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
