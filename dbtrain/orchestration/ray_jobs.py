"""Ray's job server, asked over HTTP: runs are submitted, followed, listed and stopped from any machine that reaches it.

What goes wrong between here and there is the user's to mend, and comes as one sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from dbtrain.errors import RunInterrupted, UserError

try:
    import aiohttp
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobDetails, JobSubmissionClient, JobType
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException
except ModuleNotFoundError as error:
    if error.name not in ("ray", "aiohttp", "requests"):
        raise
    raise UserError(
        f"Ray's job client is not installed here: there is no {error.name}",
        field="--address",
        mend="install 'ray[default]'",
    ) from None

from dbtrain.orchestration.addresses import EXAMPLE, checked_url, is_this_machine
from dbtrain.orchestration.submission import (
    STOPPER,
    JobFacts,
    describe,
    facts_of,
    new_submission_id,
    pack,
    stopping_command,
    tries_of,
)

_T = TypeVar("_T")

OLDEST_RAY = (2, 60)
"""What dbtrain needs on a cluster."""
_CONNECT_TIMEOUT = 10.0  # seconds
SILENCE_PATIENCE = 60.0
"""Seconds without an answer of the job server before following a job is given up."""
_QUIET_SECONDS = 60.0  # without a line of the log, before a connection is taken for dead and made anew
_START_PATIENCE = 120.0  # seconds that a small job may take to start on a busy cluster
_POLL_SECONDS = 1.0
# Loggers that tell of every upload and connection, or of a missing token before the server says what it thinks of that.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.authentication.http_token_authentication",
)
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_NETWORK_ERRORS = (requests.exceptions.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError)


class Jobs:
    """The job server of a Ray cluster."""

    def __init__(self, address: str):
        """
        Args:
            address: URL of the cluster's dashboard, such as http://10.0.0.1:8265.

        Raises:
            UserError: the URL is none of a job server, nobody answers there, or it lets in who has a token alone.
        """
        self.address = checked_url(address)
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._mended():
            _probe(self.address)
            with _without_address_variables():  # Ray would prefer them to what it is told
                self._client = JobSubmissionClient(self.address)
        # Nothing public tells it; the client has just read it to check for job servers that are too old.
        self.ray_version = self._client._server_ray_version or "0"

    def is_here(self) -> bool:
        """Whether the cluster's head is on this machine, and not behind a forwarded port of it.

        Raises UserError as the constructor does.
        """
        host = urlsplit(self.address).hostname or ""
        if not is_this_machine(host):
            return False
        with self._mended(), _without_address_variables():
            nodes = list_nodes(address=self.address, limit=1000, raise_on_missing_output=False)
        return any(node.is_head_node and node.state == "ALIVE" and is_this_machine(node.node_ip) for node in nodes)

    def check_version(self, own_interpreter: bool) -> None:
        """Whether a driver can join the cluster.

        Args:
            own_interpreter: it will run with this process's Ray.

        Raises:
            UserError: the cluster's Ray is another one, or too old.
        """
        found = tuple(int(part) if part.isdecimal() else 0 for part in self.ray_version.split(".")[:2])
        if found < OLDEST_RAY:
            raise UserError(
                f"the cluster runs Ray {self.ray_version}, and dbtrain needs {OLDEST_RAY[0]}.{OLDEST_RAY[1]} or newer",
                field="--address",
                value=self.address,
                mend="start a cluster of a newer Ray",
            )
        if own_interpreter and self.ray_version != ray.__version__:
            raise UserError(
                f"the cluster runs Ray {self.ray_version}, and this environment has {ray.__version__}",
                field="--address",
                value=self.address,
                mend="install the same version, or name an interpreter that has it with --python",
            )

    def tries(self, run: str | None = None) -> list[JobFacts]:
        """Tries of a run, newest last, those of all runs for None; see `submission.tries_of`."""
        details = self._call(self._client.list_jobs)
        facts = [_facts(job) for job in details if job.type is JobType.SUBMISSION]
        return tries_of((job for job in facts if job is not None), run)

    def check_free(self, name: str, directory: str) -> None:
        """Whether a run may be submitted.

        Raises:
            UserError: a job of that name, or on that run directory, is active.
        """
        for job in self.tries():
            if not job.active:
                continue
            stop = f"`dbtrain stop {job.run} --address {self.address}` ends it"
            if job.run == name:
                raise UserError(
                    f"its job {job.submission_id} is {job.status.lower()}",
                    field="name",
                    value=name,
                    mend=f"{stop}; --set name=NAME makes this another run",
                )
            if job.directory == directory:
                raise UserError(
                    f"the job {job.submission_id} of run {job.run} is {job.status.lower()} on it",
                    field="--run",
                    value=directory,
                    mend=f"{stop}; or choose another directory",
                )

    def submit(self, command: str, metadata: dict[str, str], name: str, config: str) -> str:
        """Send a job and return its submission id.

        Args:
            command: the shell's line, in the folder that `submission.pack` makes.
            metadata: of `submission.describe`.
            name: of the run, for the id.
            config: YAML.
        """
        submission_id = new_submission_id(name)
        with tempfile.TemporaryDirectory(prefix="dbtrain-job-") as folder:
            pack(Path(folder), config)
            self._call(
                lambda: self._client.submit_job(
                    entrypoint=command,
                    submission_id=submission_id,
                    runtime_env={"working_dir": folder},
                    metadata=metadata,
                )
            )
        return submission_id

    def job(self, submission_id: str) -> JobFacts:
        """A job of ours, as it is now."""
        found = _facts(self._call(lambda: self._client.get_job_info(submission_id)))
        assert found is not None, f"{submission_id} was found among our own"
        return found

    def follow(self, submission_id: str, write: Callable[[str], None]) -> JobFacts:
        """Hand the job's log to `write`, from its beginning and as it grows, until the job has ended; how it ended.

        Raises:
            RunInterrupted: the cluster has not answered for `SILENCE_PATIENCE`.
        """
        log = _Log(write)
        silent_since: float | None = None
        while True:
            try:
                asyncio.run(self._tail(submission_id, log))
                job = self.job(submission_id)
                if not job.active:
                    log.add_from(0, self._call(lambda: self._client.get_job_logs(submission_id)))
                    return job
                silent_since = None
            except (RuntimeError, UserError, *_NETWORK_ERRORS) as error:
                now = time.monotonic()
                if silent_since is None or log.heard > silent_since:  # what broke now had worked since
                    silent_since = now
                if now - silent_since > SILENCE_PATIENCE:
                    raise RunInterrupted(
                        f"the cluster at {self.address} does not answer any more: {_reason(error)}; once it is back, "
                        f"`dbtrain status {submission_id} --address {self.address} --follow` goes on"
                    ) from error
            time.sleep(_POLL_SECONDS)

    def stop(self, job: JobFacts, patience: float) -> str | None:
        """Have a run's workers save and leave.

        Ray itself gives a driver no more than 3 s. So a small job beside it asks the driver through the run directory;
        where there is no driver yet, or it does not answer, Ray stops the job.

        Args:
            job: an active one.
            patience: seconds to wait for the driver's answer once it is asked.

        Returns:
            None where the driver leaves by itself; or else why Ray had to stop the job.
        """
        reason = "it has not started"
        if job.status == "RUNNING":
            answer = self._ask_driver(job, patience)
            if answer is None:
                return None
            reason = answer
        self._call(lambda: self._client.stop_job(job.submission_id))
        return reason

    def _ask_driver(self, job: JobFacts, patience: float) -> str | None:
        """Why the driver could not be asked; None where it will stop."""
        asking = self.submit(
            stopping_command(job.directory, patience, job.interpreters),
            describe(job.run, job.directory, STOPPER, job.config, job.config_sha256, job.interpreters),
            f"stop-{job.run}",
            job.config,  # the same folder as the run's, which the cluster may still have
        )
        deadline = time.monotonic() + _START_PATIENCE + patience
        while (answer := self.job(asking)).active and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 2)
        if answer.active:
            self._call(lambda: self._client.stop_job(asking))
            return "nothing came of a job that was to ask it"
        return None if answer.status == "SUCCEEDED" else answer.message

    async def _tail(self, submission_id: str, log: _Log) -> None:
        position = 0
        parts = self._client.tail_job_logs(submission_id)
        while True:
            try:
                # Python 3.11's wait_for forgets a Ctrl-C that comes together with the text.
                async with asyncio.timeout(_QUIET_SECONDS):
                    text = await anext(parts)
            except (StopAsyncIteration, TimeoutError):
                return
            log.add_from(position, text)
            position += len(text)

    def _call(self, action: Callable[[], _T]) -> _T:
        with self._mended():
            return action()

    @contextlib.contextmanager
    def _mended(self) -> Iterator[None]:
        """What the network and the server refuse, as the user's mistake."""
        try:
            yield
        except AuthenticationError as error:
            raise _no_entry(self.address, error) from None
        except (*_NETWORK_ERRORS, RayStateApiException) as error:
            raise UserError(
                f"no job server answers there: {_reason(error)}",
                field="--address",
                value=self.address,
                mend=f"{EXAMPLE}, and see whether the cluster is up",
            ) from error
        except RuntimeError as error:  # what Ray's client makes of any other status
            raise UserError(
                f"the job server refuses: {_one_line(error)}", field="--address", value=self.address
            ) from error


class _Log:
    """Passes text on once, though each connection begins with what an earlier one has told."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._told = 0
        self.heard = 0.0
        """When text came last, known already or not, on the monotonic clock."""

    def add_from(self, position: int, text: str) -> None:
        """Take the text that begins at character `position` of the log."""
        self.heard = time.monotonic()
        new = text[max(0, self._told - position) :]
        if new:
            self._write(new)
            self._told = position + len(text)


def jobs_of(run: str | None, address: str) -> list[JobFacts]:
    """Tries of a run on the cluster whose dashboard is at `address`, newest last; those of all runs for None.

    Raises UserError as `Jobs` does.
    """
    return Jobs(address).tries(run)


def _facts(job: JobDetails) -> JobFacts | None:
    return facts_of(
        job.submission_id or "",
        job.metadata or {},
        str(job.status.value),
        job.message,
        job.start_time,
        job.end_time,
        job.driver_exit_code,
    )


def _probe(address: str) -> None:
    """Whether a Ray dashboard is there; Ray's client would wait for ever for who takes a connection and says nothing.

    Raises UserError where something else is, and errors of the network.
    """
    response = requests.get(f"{address}/api/version", timeout=_CONNECT_TIMEOUT)
    if response.status_code in (401, 403):
        return  # the client asks again, with the token
    try:
        version = response.json()["ray_version"] if response.ok else None
    except (ValueError, KeyError, TypeError):
        version = None
    if not isinstance(version, str):
        raise UserError(
            f"what answers there is no Ray dashboard (status {response.status_code})",
            field="--address",
            value=address,
            mend=EXAMPLE,
        )


def _no_entry(address: str, error: AuthenticationError) -> UserError:
    """The cluster wants a token (401), or another one (403)."""
    where = "RAY_AUTH_TOKEN_PATH (a file that holds it) or RAY_AUTH_TOKEN"
    if "Authentication failed" in str(error):
        return UserError(
            "the cluster does not take this token (403)",
            field="--address",
            value=address,
            mend=f"put the token that the cluster was started with into {where}",
        )
    return UserError(
        "the cluster wants a token, and none was sent (401)",
        field="--address",
        value=address,
        mend=f"set RAY_AUTH_MODE=token, and {where}",
    )


@contextlib.contextmanager
def _without_address_variables() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _reason(error: BaseException) -> str:
    """What the system said where it did; the libraries between wrap that in names of their classes."""
    if isinstance(error, requests.exceptions.Timeout):
        return f"nothing within {_CONNECT_TIMEOUT:g} s"
    said = re.search(r"\[Errno -?\d+\] ([^\"')\]]+)", str(error))
    return said.group(1) if said else _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
