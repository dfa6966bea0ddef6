"""What `dbtrain submit` sends to a cluster: a small folder, a command line, and words to recognise the job by.

The folder holds the configuration and this very package, so that driver and workers on every node run the version that
the user has. Nothing of the user's own folders travels: data and checkpoints are found by their absolute paths or URIs.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dbtrain
from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.plan import Kind

CONFIG = "config.yaml"
"""Name of the configuration in the folder that is sent."""
ACTIVE = ("PENDING", "RUNNING")
"""What Ray calls jobs that have not ended."""
WORKER_PYTHON = "DBTRAIN_WORKER_PYTHON"
"""Environment variable of a driver: interpreter of its workers on a cluster; that of each node's Ray without it."""
STOPPER = "stop"
"""The kind of a job that asks another one's driver to stop."""

_RUN, _DIRECTORY, _KIND, _VERSION = "dbtrain.run", "dbtrain.directory", "dbtrain.kind", "dbtrain.version"
_SHA256, _CONFIG, _INTERPRETERS = "dbtrain.config_sha256", "dbtrain.config", "dbtrain.interpreters"
_SCRIPT = "dbtrain/orchestration/job.sh"
_SHARE = "an absolute path on a file system that all its nodes share, or a URI such as s3://bucket"
# Sequences that colour or move, and other characters that do not print.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class JobFacts:
    """One try of a run on a cluster, as Ray knows it."""

    submission_id: str
    run: str
    """Name of the run; that of a baseline ends in -baseline."""
    directory: str
    """Run directory, absolute path or URI."""
    kind: str
    """blocks or end_to_end; `STOPPER` for a job that stops another."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """Why, in one line; what the driver said last where it failed."""
    started: float | None
    """When it was submitted, seconds since 1970."""
    ended: float | None
    exit_code: int | None
    """Of the driver; None where it did not come to its end."""
    config: str
    """The configuration that was sent, YAML."""
    config_sha256: str
    """Digest of what decides the trained bytes (`RunConfig.digest`)."""
    version: str
    """Of dbtrain."""
    interpreters: tuple[str, ...]
    """What the job looked for to run with, the first one found."""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ACTIVE


def run_name(config: RunConfig, kind: Kind) -> str:
    """By which a cluster knows the run; the two kinds may train side by side."""
    return config.name if kind == "blocks" else f"{config.name}-baseline"


def new_submission_id(name: str) -> str:
    """An id that no other try has: Ray takes each only once."""
    return f"dbtrain-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def locate_run(run: str | None, name: str, here: bool) -> str:
    """The run directory as a job finds it.

    Args:
        run: path or URI; `runs/NAME` when None.
        name: of the run.
        here: the cluster is this machine, and a relative path means this working directory.

    Raises:
        UserError: a relative path for a cluster elsewhere.
    """
    where = f"runs/{name}" if run is None else run
    if "://" in where or (not here and Path(where).is_absolute()):
        return where
    if here:
        return str(Path(where).expanduser().absolute())
    raise UserError(
        "is a path below the working directory of this machine, and the cluster is elsewhere",
        field="--run",
        value=where,
        mend=f"give {_SHARE}/{where}",
    )


def locate_data(config: RunConfig, here: bool) -> RunConfig:
    """The configuration with all folders as a job finds them; arguments and errors as of `locate_run`."""
    located = config.located()
    if here:
        return located
    for section in ("data", "model"):
        given, absolute = getattr(config, section).model_dump(), getattr(located, section).model_dump()
        for key, value in absolute.items():
            if value != given[key] and not str(given[key]).startswith("file://"):
                shown = f"data/{config.data.source}" if given[key] is None else given[key]
                raise UserError(
                    "is a path below the working directory of this machine, and the cluster is elsewhere",
                    field=f"{section}.{key}",
                    value=shown,
                    mend=f"set {section}.{key} to {_SHARE}/NAME",
                )
    return located


def interpreters(python: str | None, here: bool) -> tuple[str, ...]:
    """What a job looks for to run with, in this order: the one that is asked for, or else this machine's own one if the
    cluster is here, and what the cluster's nodes call python."""
    if python is not None:
        return (python,)
    return (*((sys.executable,) if here else ()), "python", "python3")


def training_command(kind: Kind, directory: str, pythons: Sequence[str], python: str | None = None) -> str:
    """The shell's line that trains, in the folder that `pack` makes; `python` is for the workers as well."""
    workers = "" if python is None else f"{WORKER_PYTHON}={shlex.quote(python)} "
    verb = "train" if kind == "blocks" else "baseline"
    # Ray's job server says in the environment where the cluster is.
    return f'{workers}{_command(pythons, verb, CONFIG, "--run", directory)} --address "$RAY_ADDRESS"'


def stopping_command(directory: str, patience: float, pythons: Sequence[str]) -> str:
    """The shell's line that asks the driver of a run directory to stop, in the folder that `pack` makes."""
    return _command(pythons, "stop", directory, "--timeout", f"{patience:g}")


def _command(pythons: Sequence[str], *arguments: str) -> str:
    return shlex.join(["sh", _SCRIPT, *pythons, "--", *arguments])


def pack(folder: Path, config: str) -> None:
    """Fill an empty folder with what a job works with: this package, and a configuration as YAML."""
    package, version = Path(dbtrain.__file__).parent, dbtrain.__version__
    shutil.copytree(package, folder / "dbtrain", ignore=shutil.ignore_patterns("__pycache__"))
    # The package asks for its version; a cluster may have another one installed, or none.
    installed = folder / f"dbtrain-{version}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dbtrain\nVersion: {version}\n")
    (folder / CONFIG).write_text(config, encoding="utf-8")


def describe(
    name: str, directory: str, kind: str, config: str, config_sha256: str, pythons: Sequence[str]
) -> dict[str, str]:
    """A job's metadata, which Ray keeps as strings; `facts_of` reads them back."""
    return {
        _RUN: name,
        _DIRECTORY: directory,
        _KIND: kind,
        _VERSION: dbtrain.__version__,
        _SHA256: config_sha256,
        _CONFIG: config,
        _INTERPRETERS: json.dumps(list(pythons)),
    }


def facts_of(
    submission_id: str,
    metadata: Mapping[str, str],
    status: str,
    message: str | None,
    started: int | None,
    ended: int | None,
    exit_code: int | None,
) -> JobFacts | None:
    """What Ray tells of a job, times in milliseconds since 1970; None where it is no job of ours."""
    if _RUN not in metadata:
        return None
    said = {key: _CONTROL.sub("", text) for key, text in metadata.items()}  # whoever reaches the cluster wrote it
    return JobFacts(
        submission_id=submission_id,
        run=said[_RUN],
        directory=said.get(_DIRECTORY, ""),
        kind=said.get(_KIND, ""),
        status=status,
        message=last_words(message or ""),
        started=None if started is None else started / 1000,
        ended=None if ended is None else ended / 1000,
        exit_code=exit_code,
        config=said.get(_CONFIG, ""),
        config_sha256=said.get(_SHA256, ""),
        version=said.get(_VERSION, ""),
        interpreters=tuple(json.loads(said.get(_INTERPRETERS, "[]"))),
    )


def tries_of(jobs: Iterable[JobFacts], run: str | None) -> list[JobFacts]:
    """Tries of a run, newest last: by its name, its directory, or a try's submission id; those of all runs for None."""
    wanted = [
        job
        for job in jobs
        if job.kind != STOPPER and (run is None or run in (job.run, job.directory, job.submission_id))
    ]
    return sorted(wanted, key=lambda job: (job.started or 0.0, job.submission_id))


def last_words(message: str) -> str:
    """The line of a job's message that says most: dbtrain's own last one, or else the first."""
    lines = [line for raw in message.splitlines() if (line := " ".join(_CONTROL.sub("", raw).split()))]
    ours = [line.removeprefix("dbtrain: ") for line in lines if line.startswith("dbtrain: ")]
    return (ours[-1:] or lines[:1] or [""])[0]
