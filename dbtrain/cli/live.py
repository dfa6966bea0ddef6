"""`dbtrain stop` and `dbtrain scale`: what one may ask of a live run, from anywhere that sees its directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dbtrain.cli.jobs import OptionalJobAddress, stop_job
from dbtrain.cli.output import AsJson, RunPath, emit_json
from dbtrain.errors import UserError

if TYPE_CHECKING:
    from dbtrain.orchestration.requests import Request
    from dbtrain.run_directory import RunDirectory

Patience = Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.", min=0.1)]


def stop(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run directory or URI; with --address the run's name or a submission id.",
            show_default=False,
        ),
    ],
    address: OptionalJobAddress = None,
    timeout: Patience = 30.0,
    as_json: AsJson = False,
) -> None:
    """Have every worker of a live run finish its step, save and leave; the same command goes on from there."""
    if address is not None:
        stop_job(run, address, timeout, as_json)
        return
    from dbtrain.orchestration.requests import new_request
    from dbtrain.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    _ask(directory, new_request("stop"), timeout)
    if as_json:
        emit_json({"run": directory.uri, "stopping": True})
        return
    typer.echo(f"stopping: {directory.uri}")


def scale(
    run: RunPath,
    settings: Annotated[
        list[str],
        typer.Argument(metavar="[block=N] replicas=M", help="Which block (all without it), and how many workers."),
    ],
    timeout: Patience = 30.0,
    as_json: AsJson = False,
) -> None:
    """Give a block of a live run, or all that train, another number of workers; the other blocks notice nothing."""
    from dbtrain.orchestration.requests import new_request
    from dbtrain.run_directory import RunDirectory

    wanted = _parse(settings)
    directory = RunDirectory.open(run)
    blocks = [wanted["block"]] if "block" in wanted else []
    replicas = wanted["replicas"]
    _ask(directory, new_request("scale", blocks, replicas), timeout)
    if as_json:
        emit_json({"run": directory.uri, "blocks": blocks or "all", "replicas": replicas})
        return
    which = f"block {blocks[0]}" if blocks else "all blocks"
    typer.echo(f"scaling {which} to {replicas} worker{'' if replicas == 1 else 's'}: {directory.uri}")


def _ask(run: RunDirectory, request: Request, timeout: float) -> None:
    """Raises UserError where the driver refuses."""
    from dbtrain.orchestration.requests import ask

    answer = ask(run, request, timeout)
    if not answer.done:
        raise UserError(f"refused: {answer.reason}", field=request.kind, value=run.uri)


def _parse(settings: list[str]) -> dict[str, int]:
    """`block=3 replicas=2` as numbers."""
    found: dict[str, int] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in ("block", "replicas") or name in found or not value.isdecimal():
            raise UserError(
                "is not one of block=N and replicas=M, each once", field="scale", value=setting, mend="write replicas=2"
            )
        found[name] = int(value)
    if "replicas" not in found:
        raise UserError("does not say how many workers", field="scale", value=" ".join(settings), mend="add replicas=2")
    return found
