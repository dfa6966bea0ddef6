"""A Ray cluster of several nodes on this machine, made to be broken: every node is a raylet of its own.

The nodes are started by the `ray start` command line, as on real machines, with a token that nobody else has. Every
process of a node carries the node's name in its environment and is found by it, so that closing a cluster ends all of
its processes, frozen and orphaned ones too, and never a process of another cluster.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARK = "DBTRAIN_LOCAL_NODE"
"""Environment variable that holds the name of the node a process belongs to."""
OBJECT_STORE_BYTES = 78 * 2**20  # Ray's least is 75 MiB
START_SECONDS = 120.0
GONE_SECONDS = 60.0


@dataclass
class LocalNode:
    """One raylet, and on the head the GCS, with all processes below them."""

    name: str
    """The value of `MARK` in the environment of its processes."""
    launcher: subprocess.Popen[bytes]
    """The `ray start --block` that watches over the node's processes."""
    log: Path
    """What the launcher prints."""

    def processes(self) -> dict[int, str]:
        """Process ids of the node and their command lines, the launcher's included."""
        return {pid: line for pid, line in _marked(self.name) if line}

    def raylet(self) -> int:
        """Process id of the raylet.

        Raises:
            LookupError: it is gone.
        """
        return self._find("raylet")

    def gcs(self) -> int:
        """Process id of the GCS server; raises as `raylet` does, and on a node that is not the head."""
        return self._find("gcs_server")

    def alive(self) -> bool:
        """Whether the raylet is there."""
        try:
            return self.raylet() > 0
        except LookupError:
            return False

    def kill_raylet(self) -> int:
        """SIGKILL the raylet; its workers and agents then go by themselves. Returns its process id."""
        pid = self.raylet()
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_until_gone(self, but: Sequence[int] = (), seconds: float = GONE_SECONDS) -> None:
        """Return when no process of the node is left but those of `but`, frozen ones for example.

        Raises:
            TimeoutError: some stay.
        """
        wait_for(lambda: self.processes().keys() <= set(but), f"node {self.name} to go", seconds)

    def end(self) -> None:
        """SIGKILL every process of the node, until there is none."""
        # A process may fork while we read the list.
        deadline = time.monotonic() + GONE_SECONDS
        while pids := [pid for pid, _ in _marked(self.name)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes of node {self.name} do not go: {self.processes()}")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.launcher.poll()  # reaps it
            time.sleep(0.02)
        self.launcher.wait()

    def _find(self, program: str) -> int:
        for pid, line in self.processes().items():
            if Path(line.split("\0")[0]).name == program:
                return pid
        raise LookupError(f"node {self.name} has no {program}")


@dataclass
class LocalCluster:
    """A head and other nodes; `close` ends them all. Use `local_cluster` to be sure that it is called."""

    folder: Path
    """Holds the token, the launchers' output and Ray's session folders; removed by `close`."""
    nodes: list[LocalNode] = field(default_factory=list)
    """Nodes in the order in which they were started, dead ones too; the first is the head."""
    address: str = ""
    """host:port of the GCS."""
    _name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def head(self) -> LocalNode:
        """The node with the GCS."""
        return self.nodes[0]

    def environment(self) -> dict[str, str]:
        """The environment in which a driver is let into the cluster."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != MARK}
        return kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token()),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start_head(
        self,
        cpus: float = 1,
        ip: str = "127.0.0.1",
        wrap: Sequence[str] = (),
        extra: Mapping[str, str] | None = None,
        dashboard: int | None = None,
    ) -> LocalNode:
        """Start GCS and raylet, and wait until they answer.

        Args:
            cpus: that the node offers, whatever the machine has.
            ip: of the node.
            wrap: command before `ray start`, such as `ip netns exec NAME`.
            extra: further environment variables.
            dashboard: port of the dashboard and the job server, on the loopback address; none without it.
        """
        port = free_port(ip) if not wrap else 6379
        self.address = f"{ip}:{port}"
        role = ["--head", f"--port={port}", f"--include-dashboard={str(dashboard is not None).lower()}"]
        if dashboard is not None:
            role += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        return self._start(role, cpus, ip, wrap, extra)

    def add_node(
        self, cpus: float = 1, ip: str = "127.0.0.1", wrap: Sequence[str] = (), extra: Mapping[str, str] | None = None
    ) -> LocalNode:
        """Start a raylet that joins the head; arguments as of `start_head`."""
        return self._start([f"--address={self.address}"], cpus, ip, wrap, extra)

    def close(self) -> None:
        """End every process of every node, and remove the folder."""
        try:
            # Raylets first would have their orphans ask a GCS that is gone; there is no order that nobody minds.
            for node in reversed(self.nodes):
                node.end()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _token(self) -> Path:
        path = self.folder / "token"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        return path

    def _start(
        self, role: list[str], cpus: float, ip: str, wrap: Sequence[str], extra: Mapping[str, str] | None
    ) -> LocalNode:
        number = len(self.nodes)
        name, log = f"{self._name}-{number}", self.folder / f"node-{number}.log"
        ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", *role]
        # Ports of our own choice would collide with another cluster's; 0 leaves them to the system.
        ray_start += [
            f"--node-ip-address={ip}",
            f"--num-cpus={cpus:g}",
            "--num-gpus=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            f"--temp-dir={self.folder / str(number)}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
            "--block",
        ]
        with log.open("wb") as output:
            launcher = subprocess.Popen(
                [*wrap, *ray_start],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment() | dict(extra or {}) | {MARK: name},
                start_new_session=True,
            )
        node = LocalNode(name, launcher, log)
        self.nodes.append(node)

        def up() -> bool:
            if launcher.poll() is not None:
                raise RuntimeError(f"ray start ended with {launcher.returncode}:\n{log.read_text()}")
            return "Ray runtime started" in log.read_text()

        wait_for(up, f"node {name}", START_SECONDS)
        return node


@contextlib.contextmanager
def local_cluster(nodes: int = 3, cpus: float = 1) -> Iterator[LocalCluster]:
    """A cluster of `nodes` raylets on the loopback address; nothing of it is left afterwards."""
    with bare_cluster() as cluster:
        cluster.start_head(cpus)
        for _ in range(nodes - 1):
            cluster.add_node(cpus)
        yield cluster


@contextlib.contextmanager
def bare_cluster() -> Iterator[LocalCluster]:
    """A cluster without nodes yet, which is closed at the end."""
    # Paths of Ray's sockets have to be short.
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="dbt-", dir="/tmp")))
    try:
        yield cluster
    finally:
        cluster.close()


def wait_for(condition: Callable[[], bool], what: str, seconds: float, poll: float = 0.05) -> None:
    """Return when the condition holds.

    Raises:
        TimeoutError: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(poll)


def free_port(ip: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on, below those that the system hands out by itself."""
    for _ in range(1000):
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe:
            try:
                probe.bind((ip, port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port on {ip}")


def _marked(name: str) -> Iterator[tuple[int, str]]:
    """Process ids and command lines (parts end in NUL; empty for zombies) of processes that carry a node's name."""
    wanted = f"{MARK}={name}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name), (entry / "cmdline").read_text()
            except OSError:
                continue  # it has ended, or is another user's
