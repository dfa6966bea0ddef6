"""Command lines about runs on a cluster, and what they refuse; the cluster is a server that says what a test wants."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from command import assert_refused, dbtrain, finish, start
from job_server import JobServer
from local_cluster import wait_for

from dbtrain.config_file import load_config
from dbtrain.orchestration import ray_jobs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    monkeypatch.setattr(ray_jobs, "_POLL_SECONDS", 0.01)
    server = JobServer()
    yield server
    server.close()


def submit(server: JobServer, recipe: Path, *more: object) -> tuple[object, ...]:
    return ("submit", recipe, "--address", server.url, *more)


def test_what_is_sent(server: JobServer, recipe: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "data").mkdir()
    (place / "data" / "large.bin").write_bytes(b"x")
    # Ray would go there instead of to the address it is given.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    result = dbtrain(*submit(server, recipe, "--set", "seed=9", "--interleave", "5", "--json"))
    sent = result.json()
    job = server.jobs[sent["submission_id"]]
    assert (sent["run"], sent["directory"], sent["address"]) == ("small", str(place / "runs/small"), server.url)
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    # The resolved configuration, once for the job and once for who asks what it was.
    config = yaml.safe_load(server.file_in_package("config.yaml"))
    assert (config["seed"], config["resources"]["interleave"]) == (9, 5)
    assert config == yaml.safe_load(job["metadata"]["dbtrain.config"])
    expected = load_config(recipe, ["seed=9", "resources.interleave=5"])
    assert job["metadata"]["dbtrain.config_sha256"] == expected.digest()
    # This very package, and nothing of the working directory.
    names = server.names_in_package()
    assert {"dbtrain/__main__.py", "dbtrain/orchestration/job.sh"} <= set(names)
    assert not [name for name in names if "large" in name or "__pycache__" in name or ".git" in name]
    words = shlex.split(job["entrypoint"])
    assert words[-6:] == ["train", "config.yaml", "--run", sent["directory"], "--address", "$RAY_ADDRESS"]
    assert job["entrypoint"].endswith('"$RAY_ADDRESS"')  # for the shell of the job


def test_what_a_person_sees(server: JobServer, recipe: Path, place: Path) -> None:
    result = finish(start(*submit(server, recipe)), 60)
    (submission_id,) = server.jobs
    assert result.stdout == f"submitted: {submission_id}\nrun directory: {place}/runs/small\n"
    # Nothing of the libraries' own talk.
    assert result.stderr == f"next: dbtrain status small --address {server.url} --follow\n"


def test_a_baseline_is_another_run_and_each_try_another_job(server: JobServer, recipe: Path, place: Path) -> None:
    first = dbtrain(*submit(server, recipe, "--json")).json()
    beside = dbtrain(*submit(server, recipe, "--baseline", "--python", "/opt/my python", "--json")).json()
    assert beside["run"] == "small-baseline"
    job = server.jobs[beside["submission_id"]]
    assert "'/opt/my python' -- baseline config.yaml" in job["entrypoint"]
    assert job["entrypoint"].startswith("DBTRAIN_WORKER_PYTHON='/opt/my python' ")
    server.jobs[first["submission_id"]]["status"] = "FAILED"
    again = dbtrain(*submit(server, recipe, "--json")).json()
    assert (again["run"], again["directory"]) == (first["run"], first["directory"])
    assert again["submission_id"] != first["submission_id"]


def test_a_run_that_is_active_is_not_submitted_twice(server: JobServer, recipe: Path, place: Path) -> None:
    first = dbtrain(*submit(server, recipe, "--json")).json()["submission_id"]
    sent = server.requests.count("POST /api/jobs/")
    refused = dbtrain(*submit(server, recipe))
    assert_refused(refused, "name = 'small'", first, f"dbtrain stop small --address {server.url}", "--set name=")
    refused = dbtrain(*submit(server, recipe, "--set", "name=other", "--run", "runs/small"))
    assert_refused(refused, "--run", first, "of run small is running on it", "another directory")
    assert server.requests.count("POST /api/jobs/") == sent


def test_a_mistake_in_the_configuration_asks_nothing_of_the_cluster(server: JobServer, recipe: Path) -> None:
    assert_refused(dbtrain(*submit(server, recipe, "--set", "training.step=5")), "training.step", "did you mean")
    assert_refused(dbtrain(*submit(server, "nowhere.yaml")), "no such configuration file")
    assert server.requests == []


@pytest.mark.parametrize("arguments", [("--run", "runs/a"), (), ("--run", "~/a")])
def test_a_cluster_elsewhere_does_not_know_this_working_directory(
    server: JobServer, recipe: Path, arguments: tuple[str, ...]
) -> None:
    server.head_ip = "203.0.113.7"  # behind a port of this machine that leads there
    assert_refused(dbtrain(*submit(server, recipe, *arguments)), "--run", "the cluster is elsewhere", "all its nodes")
    assert server.package == b""


def test_data_for_a_cluster_elsewhere(server: JobServer, recipe: Path) -> None:
    server.head_ip = "203.0.113.7"
    there = submit(server, recipe, "--run", "/shared/runs/a", "--json")
    for setting, field in (
        ("data.path=null", "data.path = 'data/digits'"),
        ("data.path=shards", "data.path = 'shards'"),
        ("data.cache=~/copies", "data.cache = '~/copies'"),
    ):
        assert_refused(dbtrain(*there, "--set", setting), field, "the cluster is elsewhere")
    assert server.package == b""
    job = server.jobs[dbtrain(*there, "--set", "data.path=s3://bucket/digits").json()["submission_id"]]
    # Its own interpreters, not this machine's.
    assert job["entrypoint"].startswith("sh dbtrain/orchestration/job.sh python python3 -- train")
    assert yaml.safe_load(job["metadata"]["dbtrain.config"])["data"]["path"] == "s3://bucket/digits"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("head:8265", "write http://head:8265"),
        ("auto", "is not a URL"),
        ("ray://head:10001", "Ray Client"),
        ("ftp://head", "http or https"),
        ("http://", "names no host"),
        ("http://head:port", "is not a URL"),
        ("http://head..net:8265", "is not a URL"),
        ("http://127.0.0.1:1", "no job server answers there: Connection refused"),
    ],
)
def test_addresses_of_no_job_server(recipe: Path, address: str, problem: str) -> None:
    for verb in (("submit", recipe), ("status",), ("stop", "small")):
        assert_refused(dbtrain(*verb, "--address", address), "--address", address, problem, "8265")


@pytest.mark.parametrize(
    ("status", "text", "parts"),
    [
        (401, "Unauthorized", ("wants a token", "401", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH")),
        (403, "Forbidden", ("does not take this token", "403", "RAY_AUTH_TOKEN_PATH")),
        (404, "nothing here", ("no Ray dashboard", "404", "http://HEAD:8265")),
        (200, "<html>another page</html>", ("no Ray dashboard",)),
        (200, '{"version": "1"}', ("no Ray dashboard",)),
        (200, "[1]", ("no Ray dashboard",)),
        (500, "broken", ("no Ray dashboard", "500")),
    ],
)
def test_servers_that_do_not_let_in_or_are_none(
    server: JobServer, recipe: Path, status: int, text: str, parts: tuple[str, ...]
) -> None:
    server.answer = web.Response(status=status, text=text)
    for verb in (("submit", recipe), ("status",), ("stop", "small")):
        assert_refused(dbtrain(*verb, "--address", server.url), server.url, *parts)


def test_a_server_that_says_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        assert_refused(dbtrain("status", "--address", address), address, "nothing within 0.2 s")


@pytest.mark.parametrize("missing", ["ray", "aiohttp"])  # the latter where Ray came without [default]
def test_no_ray_here(recipe: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dbtrain.orchestration.ray_jobs")
    monkeypatch.setitem(sys.modules, missing, None)
    assert_refused(dbtrain("submit", recipe, "--address", "http://head:8265"), "not installed", "ray[default]")


def test_clusters_of_other_versions(server: JobServer, recipe: Path, place: Path) -> None:
    server.ray_version = "2.40.0"
    assert_refused(dbtrain(*submit(server, recipe)), "Ray 2.40.0", "2.60 or newer")
    server.ray_version = "2.999.0"
    assert_refused(dbtrain(*submit(server, recipe)), "Ray 2.999.0", "this environment has", "--python")
    assert server.package == b""
    assert dbtrain(*submit(server, recipe, "--python", "/opt/python")).code == 0


def test_status_of_runs(server: JobServer) -> None:
    assert "no run was submitted" in dbtrain("status", "--address", server.url).stdout
    server.add("one", "FAILED")
    server.jobs["one"]["message"] = "failed, last logs:\nx\n\x1b[31mdbtrain: --run: [b]other[/b]\n"
    server.add("two")
    server.add("three", run="vit-baseline", directory="/shared/[b]\x1b[31mother", interpreters="no JSON")
    server.add("stopper", kind="stop")
    server.jobs["driver"] = server.jobs["one"] | {"type": "DRIVER", "submission_id": None}
    server.jobs["strange"] = server.jobs["one"] | {"submission_id": "strange", "metadata": {"owner": "somebody"}}
    shown = dbtrain("status", "--address", server.url + "/").stdout
    assert shown.index("one") < shown.index("two") < shown.index("three")
    assert "/shared/[b]other" in shown  # neither markup nor a colour
    assert "stopper" not in shown
    assert "strange" not in shown
    jobs = dbtrain("status", "vit", "--address", server.url, "--json").json()["jobs"]
    assert [(job["submission_id"], job["status"]) for job in jobs] == [("one", "FAILED"), ("two", "RUNNING")]
    # Named by the directory or the id as well; the driver's own words, plain.
    assert len(dbtrain("status", "/shared/vit", "--address", server.url, "--json").json()["jobs"]) == 2
    assert "\none: --run: [b]other[/b]\n" in dbtrain("status", "one", "--address", server.url).stdout
    assert_refused(dbtrain("status", "nobody", "--address", server.url), "RUN = 'nobody'", "no such run")
    assert_refused(dbtrain("status", "--follow", "--address", server.url), "--follow", "needs a run")


def test_a_log_is_followed_over_a_broken_connection(server: JobServer) -> None:
    server.add("one")
    server.log["one"] = [["first\n", "sec"], ["first\nsecond\n", "third\n"]]
    result = dbtrain("status", "vit", "--address", server.url, "--follow")
    assert (result.code, result.stdout) == (0, "first\nsecond\nthird\n")
    assert "one: succeeded" in result.stderr


def test_connections_that_bring_something_are_no_silence(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is between may end each connection after a while; the job is followed for longer than the patience.
    monkeypatch.setattr(ray_jobs, "SILENCE_PATIENCE", 0.0)
    server.add("one")
    server.log["one"] = [["line\n"]] * 5
    result = dbtrain("status", "one", "--address", server.url, "--follow")
    assert (result.code, result.stdout) == (0, "line\n")


def test_a_connection_that_died_unnoticed_is_made_anew(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_QUIET_SECONDS", 0.2)
    server.add("one")
    server.log["one"] = [["first\n", None], ["first\n", "second\n"]]
    result = dbtrain("status", "one", "--address", server.url, "--follow")
    assert (result.code, result.stdout) == (0, "first\nsecond\n")


@pytest.mark.parametrize(("status", "exit_code", "code"), [("FAILED", 1, 1), ("FAILED", 2, 2), ("STOPPED", None, 1)])
def test_how_a_followed_job_ends(server: JobServer, status: str, exit_code: int | None, code: int) -> None:
    server.add("one")
    server.log["one"] = [["line\n"]]
    server.jobs["one"] |= {"ends_as": status, "driver_exit_code": exit_code, "message": "dbtrain: too bad"}
    result = dbtrain("status", "one", "--address", server.url, "--follow", "--json")
    assert result.code == code
    assert (result.json()["status"], result.json()["message"]) == (status, "too bad")
    assert "line\n" in result.stderr


def test_a_cluster_that_is_gone_while_it_is_followed(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "SILENCE_PATIENCE", 0.1)
    server.add("one")
    server.log["one"] = [["line\n"]] * 1000
    watcher = threading.Timer(0.3, lambda: setattr(server, "answer", web.Response(status=502, text="gone")))
    watcher.start()
    result = dbtrain("status", "one", "--address", server.url, "--follow")
    watcher.join()
    assert result.code == 1
    assert "does not answer any more" in result.stderr
    assert f"dbtrain status one --address {server.url} --follow" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_following_and_not_the_job(server: JobServer) -> None:
    server.add("one")
    server.log["one"] = [["line\n"]] * 10_000
    process: subprocess.Popen[str] = start("status", "vit", "--address", server.url, "--follow")
    wait_for(lambda: "GET /api/jobs/one/logs/tail" in server.requests, "the first connection", 60)
    process.send_signal(signal.SIGINT)
    result = finish(process, 60)
    assert result.code == 1
    assert "the job goes on" in result.stderr
    assert f"dbtrain status one --address {server.url} --follow" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [line for line in server.requests if line.endswith("/stop")]


def test_ctrl_c_together_with_text_is_not_lost(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the text that is waited for is there already when the signal comes."""
    server.add("one")
    jobs = ray_jobs.Jobs(server.url)

    async def lines(submission_id: str) -> AsyncIterator[str]:
        yield "one\n"
        os.kill(os.getpid(), signal.SIGINT)
        yield "two\n"
        await asyncio.sleep(3600)

    monkeypatch.setattr(jobs._client, "tail_job_logs", lines)
    monkeypatch.setattr(ray_jobs, "_QUIET_SECONDS", 3600)
    with pytest.raises(KeyboardInterrupt):
        jobs.follow("one", lambda text: None)


def test_stop_asks_the_driver_by_a_job_beside_it(server: JobServer) -> None:
    server.add("one")
    server.ends_as["stop"] = "SUCCEEDED"
    stopped = dbtrain("stop", "vit", "--address", server.url, "--timeout", "7", "--json").json()
    assert (stopped["submission_id"], stopped["graceful"], stopped["run"]) == ("one", True, "/shared/vit")
    (asking,) = [job for job in server.jobs.values() if job["metadata"]["dbtrain.kind"] == "stop"]
    assert asking["entrypoint"].endswith("job.sh python -- stop /shared/vit --timeout 7")
    assert server.jobs["one"]["status"] == "RUNNING"  # it leaves by itself
    # Such a job is no try of the run.
    assert [job["submission_id"] for job in dbtrain("status", "--address", server.url, "--json").json()["jobs"]] == [
        "one"
    ]


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_ray_stops_a_job_whose_driver_cannot_be_asked(server: JobServer, status: str) -> None:
    server.add("one", status)
    server.ends_as["stop"] = "FAILED"
    result = dbtrain("stop", "one", "--address", server.url)
    assert (result.code, result.stdout) == (0, "stopping: one\n")
    assert "could not be asked" in result.stderr
    assert server.jobs["one"]["status"] == "STOPPED"
    assert_refused(dbtrain("stop", "one", "--address", server.url), "no job of this run is active", "dbtrain status")
