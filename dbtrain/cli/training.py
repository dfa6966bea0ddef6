"""`dbtrain train` and `dbtrain baseline`: the same machinery on two plans."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from dbtrain.cli.output import AsJson, ConfigFile, Overrides, emit_json, err, report, whole_number
from dbtrain.config_file import load_config
from dbtrain.errors import UserError

if TYPE_CHECKING:
    from dbtrain.orchestration.run import RunResult
    from dbtrain.plan import Kind


class BackendChoice(StrEnum):
    """Where blocks train."""

    ray = "ray"
    inline = "inline"


RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="DIR", help="Run directory or URI; runs/NAME by default.", show_default=False),
]
BackendOption = Annotated[
    BackendChoice, typer.Option("--backend", help="Ray workers, or this process, one block after the other.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to join; a private one by default.", show_default=False),
]
InterleaveOption = Annotated[
    int | None,
    typer.Option(
        "--interleave",
        metavar="STEPS",
        parser=whole_number("--interleave"),
        help="With fewer workers than blocks: let blocks take turns of so many steps.",
        show_default=False,
    ),
]


def train(
    config: ConfigFile,
    run: RunOption = None,
    backend: BackendOption = BackendChoice.ray,
    address: AddressOption = None,
    order: Annotated[
        str | None,
        typer.Option("--order", metavar="2,1,0", help="Order in which blocks get a worker.", show_default=False),
    ] = None,
    interleave: InterleaveOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train every block, each by itself; on an unfinished run directory, resume it."""
    settings = with_interleave(overrides, interleave)
    _train("blocks", config, run, backend, address, _parse_order(order), settings, as_json)


def baseline(
    config: ConfigFile,
    run: RunOption = None,
    backend: BackendOption = BackendChoice.ray,
    address: AddressOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train the same network end to end, with equal layer-evaluations, to compare with."""
    _train("end_to_end", config, run, backend, address, None, overrides, as_json)


def with_interleave(overrides: list[str] | None, interleave: int | None) -> list[str]:
    """The overrides, with the one that `--interleave` stands for."""
    return [*(overrides or []), *([] if interleave is None else [f"resources.interleave={interleave}"])]


def _train(
    kind: Kind,
    config_file: ConfigFile,
    run: str | None,
    backend: BackendChoice,
    address: str | None,
    order: list[int] | None,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    config = load_config(config_file, overrides or [])
    if address is not None and backend is BackendChoice.inline:
        raise UserError(
            "goes with --backend ray alone", field="--address", value=address, mend="leave out one of the two"
        )
    if order is not None and sorted(order) != list(range(config.blocks.count)):
        raise UserError(
            "has to name every block once",
            field="--order",
            value=",".join(map(str, order)),
            mend=f"name 0 to {config.blocks.count - 1}",
        )
    suffix = "" if kind == "blocks" else "-baseline"
    where = run or f"runs/{config.name}{suffix}"

    from dbtrain.monitoring.terminal import watch_terminal
    from dbtrain.orchestration.run import train_run

    with watch_terminal(err) as watch:
        result = train_run(config, where, kind, backend.value, address=address, order=order, watch=watch)
    if as_json:
        emit_json(result.to_json())
    elif result.ok:
        typer.echo(f"finished: {result.run}")
        err.print(f"next: dbtrain assemble {result.run}", soft_wrap=True, markup=False)
    if not result.ok:
        _report_failure(result)
        raise typer.Exit(1)


def _parse_order(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError("is not a list of block numbers", field="--order", value=text, mend="write 2,1,0") from None


def _report_failure(result: RunResult) -> None:
    """One message: the first reason, and where the others are."""
    failed = [block for block in result.blocks if block.state.value == "failed"]
    if not failed:
        report(f"stopped; the same command goes on where it left: {result.run}")
        return
    first, *others = failed
    message = f"block {first.index} failed at step {first.step}: {first.reason}"
    if others:
        message += f"; so did {', '.join(str(block.index) for block in others)}"
    report(f"{message}; journal: {result.run}/events.jsonl; the same command tries again from the newest checkpoints")
