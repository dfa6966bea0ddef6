"""`dbtrain submit`, and what one may know and ask of a run on a cluster by its name: `status`, `stop --address`."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape

from dbtrain.cli.output import AsJson, ConfigFile, Overrides, emit_json, err, print_table, report
from dbtrain.cli.training import InterleaveOption, with_interleave
from dbtrain.cli.watching import show_status
from dbtrain.config_file import load_config
from dbtrain.errors import UserError

if TYPE_CHECKING:
    from dbtrain.orchestration.ray_jobs import Jobs
    from dbtrain.orchestration.submission import JobFacts
    from dbtrain.plan import Kind

JobAddress = Annotated[
    str, typer.Option("--address", metavar="URL", help="The cluster's dashboard, such as http://HEAD:8265.")
]
OptionalJobAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Look for the run by name on the cluster with this dashboard.",
        show_default=False,
    ),
]
Follow = Annotated[
    bool, typer.Option("--follow", help="Print the job's log until it has ended; Ctrl-C ends that, not the job.")
]


def submit(
    config: ConfigFile,
    address: JobAddress,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="Run directory that all nodes see, or URI; runs/NAME by default if the cluster is this machine.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Train end to end, as `dbtrain baseline` does.")] = False,
    interleave: InterleaveOption = None,
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            metavar="PATH",
            help="Interpreter of the job on every node, instead of the one that Ray runs under.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Train on a Ray cluster as a job that goes on without this machine; a run that has ended before is resumed."""
    from dbtrain.orchestration import submission

    checked = load_config(config, with_interleave(overrides, interleave))
    kind: Kind = "end_to_end" if baseline else "blocks"
    name = submission.run_name(checked, kind)

    from dbtrain.orchestration.ray_jobs import Jobs

    jobs = Jobs(address)
    here = jobs.is_here()
    jobs.check_version(own_interpreter=here and python is None)
    directory = submission.locate_run(run, name, here)
    located = submission.locate_data(checked, here)
    jobs.check_free(name, directory)
    pythons, sent = submission.interpreters(python, here), located.to_yaml()
    submission_id = jobs.submit(
        submission.training_command(kind, directory, pythons, python),
        submission.describe(name, directory, kind, sent, located.digest(), pythons),
        name,
        sent,
    )
    result = {"submission_id": submission_id, "run": name, "directory": directory, "address": jobs.address}
    if follow:
        _follow(jobs, submission_id, result, as_json)
    if as_json:
        emit_json(result)
        return
    typer.echo(f"submitted: {submission_id}\nrun directory: {directory}")
    err.print(f"next: dbtrain status {name} --address {jobs.address} --follow", soft_wrap=True, markup=False)


def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run directory or URI; with --address the run's name, a submission id, or nothing for all runs.",
            show_default=False,
        ),
    ] = None,
    address: OptionalJobAddress = None,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands: from its directory, or with --address its tries on a cluster."""
    if address is None:
        if run is None:
            raise UserError(
                "is required and was not given",
                field="RUN",
                mend="give a run directory, or --address to list what runs on a cluster",
            )
        if follow:
            raise UserError("goes with --address alone", field="--follow", mend="use `dbtrain monitor RUN`")
        show_status(run, as_json)
        return
    from dbtrain.orchestration.ray_jobs import Jobs

    jobs = Jobs(address)
    tries = jobs.tries(run)
    if not tries and run is not None:
        raise UserError(
            "no such run was submitted there",
            field="RUN",
            value=run,
            mend=f"`dbtrain status --address {jobs.address}` lists what was",
        )
    if follow:
        if run is None:
            raise UserError("needs a run", field="--follow", mend="give the run's name before --address")
        _follow(jobs, tries[-1].submission_id, {"run": tries[-1].run, "directory": tries[-1].directory}, as_json)
    if as_json:
        emit_json({"address": jobs.address, "jobs": [_plain(job) for job in tries]})
        return
    _print(tries, jobs.address)


def stop_job(run: str, address: str, timeout: float, as_json: bool) -> None:
    """`dbtrain stop RUN --address URL`."""
    from dbtrain.orchestration.ray_jobs import Jobs

    jobs = Jobs(address)
    active = [job for job in jobs.tries(run) if job.active]
    if not active:
        raise UserError(
            "no job of this run is active there",
            field="RUN",
            value=run,
            mend=f"`dbtrain status --address {jobs.address}` lists all jobs",
        )
    job = active[-1]
    reason = jobs.stop(job, timeout)
    if as_json:
        emit_json(
            {
                "run": job.directory,
                "submission_id": job.submission_id,
                "stopping": True,
                "graceful": reason is None,
                "reason": reason,
            }
        )
        return
    typer.echo(f"stopping: {job.submission_id}")
    if reason is not None:
        report(f"stopped by Ray, which leaves a driver 3 s; its driver could not be asked: {reason}")


def _follow(jobs: Jobs, submission_id: str, result: dict[str, str], as_json: bool) -> NoReturn:
    """Print the job's log and leave as `dbtrain train` would: 0 done, 1 failed or stopped, 2 a mistake."""
    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        job = jobs.follow(submission_id, write)
    except KeyboardInterrupt:
        back = f"`dbtrain status {submission_id} --address {jobs.address} --follow` comes back to it"
        report(f"not followed any more; the job goes on, and {back}")
        raise typer.Exit(1) from None
    if as_json:
        emit_json(result | _plain(job))
    report(f"{submission_id}: {job.status.lower()}" + (f": {job.message}" if job.message else ""))
    if job.status == "SUCCEEDED":
        raise typer.Exit(0)
    raise typer.Exit(2 if job.exit_code == 2 else 1)


def _plain(job: JobFacts) -> dict[str, Any]:
    """For programs; the configuration is in the run directory."""
    facts = asdict(job)
    del facts["config"], facts["interpreters"]
    return facts


def _print(tries: list[JobFacts], address: str) -> None:
    if not tries:
        typer.echo(f"no run was submitted to {address}")
        return
    rows = [
        [
            escape(job.submission_id),
            escape(job.run),
            job.status.lower(),
            _time(job.started),
            _time(job.ended),
            escape(job.directory),
        ]
        for job in tries
    ]
    print_table(
        f"jobs at {address}, newest last", ["submission", "run", "status", "submitted", "ended", "directory"], rows
    )
    if tries[-1].message:
        typer.echo(f"{tries[-1].submission_id}: {tries[-1].message}")


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
