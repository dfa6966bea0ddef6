"""`cluster/local.sh`: real nodes come up, are mended, and go without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment import ROOT, TOOLS, processes_with
from local_cluster import free_port

# The head takes some seconds to notice that a node has died.
COUNT = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + 90
while (alive := sum(node["Alive"] for node in ray.nodes())) > 2 and time.monotonic() < deadline:
    time.sleep(0.2)
print(alive, ray.cluster_resources()["CPU"])
"""


def local_sh(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        ["bash", "cluster/local.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        env=kept | {"PATH": f"{TOOLS}:{kept['PATH']}", "DBTRAIN_LOCAL_CLUSTER": str(folder), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a cluster may be, and where none is afterwards."""
    # The paths of Ray's sockets have to be short.
    path = Path(tempfile.mkdtemp(prefix="dbt-", dir="/tmp"))
    yield path
    local_sh(path, "down")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say up, status or down"),
        (["start"], "say up, status or down"),
        (["up", "--nodes", "0"], "--nodes 0 is not a whole number above 0"),
        (["up", "--cpus"], "--cpus needs a value"),
        (["up", "--gpus", "1"], "there is no option --gpus"),
        (["down", "--nodes", "2"], "down takes no options"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = local_sh(tmp_path / "cluster", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"cluster/local.sh: {message}\n")
    assert not (tmp_path / "cluster").exists()


def test_down_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    # Whoever names a folder of theirs, such as their home, gets it back as it was.
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos.pid").write_text("1")
    (tmp_path / "token").write_text("t")
    done = local_sh(tmp_path, "down")
    assert (done.returncode, done.stdout) == (0, "no node is left\n"), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "photos.pid"}


def test_a_path_too_long_for_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 10)
    done = local_sh(folder, "up")
    assert done.returncode == 2
    assert "DBTRAIN_LOCAL_CLUSTER" in done.stderr
    assert not folder.exists()


def test_nothing_to_end(tmp_path: Path) -> None:
    assert local_sh(tmp_path / "cluster", "down").returncode == 0
    done = local_sh(tmp_path / "cluster", "status")
    assert (done.returncode, done.stdout) == (1, f"no cluster runs from {tmp_path / 'cluster'}\n")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_up_again_and_down(folder: Path) -> None:
    gcs, jobs = free_port("127.0.0.1"), free_port("127.0.0.1")
    command = ("up", "--nodes", 2, "--port", gcs, "--dashboard-port", jobs)
    first = local_sh(folder, *command)
    assert first.returncode == 0, first
    assert "2 nodes run" in first.stdout
    assert f"--address 127.0.0.1:{gcs}\n" in first.stdout
    assert (folder / "token").stat().st_mode & 0o777 == 0o600

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{jobs}/api/version", timeout=20)

    launcher = int((folder / "1.pid").read_text())
    os.kill(launcher, signal.SIGKILL)
    died = local_sh(folder, "status")
    assert died.returncode == 0
    assert "node 1 has died" in died.stdout
    again = local_sh(folder, *command)
    assert again.returncode == 0, again
    assert "starting node 1" in again.stdout
    assert "starting node 0" not in again.stdout

    counted = subprocess.run(
        ["bash", "-c", f'source {folder}/env && exec "$@"', "-", TOOLS / "python", "-c", COUNT, f"127.0.0.1:{gcs}"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    # Before it Ray may tell of the dead node.
    assert counted.stdout.splitlines()[-1:] == ["2 2.0"], counted

    mark = f"DBTRAIN_CLUSTER_NODE={folder}/"
    assert processes_with(mark)
    down = local_sh(folder, "down")
    assert down.returncode == 0, down
    assert processes_with(mark) == {}
    assert not folder.exists()
