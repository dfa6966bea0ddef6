"""`dbtrain monitor`, and `dbtrain status` of a run directory: how a run stands, also when it is over."""

from __future__ import annotations

import io
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from dbtrain.cli.output import AsJson, RunPath, emit_json, err, out
from dbtrain.cli.web import LOOPBACK, PORT, Bind, Port, Samples, Token, serve_web
from dbtrain.errors import UserError

if TYPE_CHECKING:
    from dbtrain.monitoring.run_view import RunView
    from dbtrain.run_directory import RunDirectory

_OFTENEST, _USUAL, _SELDOMEST = 0.1, 1.0, 3600.0  # seconds


def monitor(
    run: RunPath,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", help="Between two looks, in the terminal.")
    ] = _USUAL,
    web: Annotated[bool, typer.Option("--web", help="As a page for the browser.")] = False,
    port: Port = PORT,
    bind: Bind = LOOPBACK,
    token: Token = None,
    samples: Samples = None,
    as_json: AsJson = False,
) -> None:
    """Watch a run live, in the terminal (? lists the keys, q leaves) or in a browser; its directory is only read."""
    if web:
        if every != _USUAL:
            mend = "leave it out: the page looks once a second"
            raise UserError("does not go with --web", field="--every", value=every, mend=mend)
        serve_web(run, port, bind, token, samples, as_json)
        return
    for option, value, usual in (
        ("--port", port, PORT),
        ("--bind", bind, LOOPBACK),
        ("--token", token, None),
        ("--samples", samples, None),
    ):
        if value != usual:
            said = None if option == "--token" else value  # which is nobody's business who reads along
            raise UserError("goes with --web alone", field=option, value=said, mend="add --web, or leave it out")
    if as_json:
        show_status(run, as_json)
        return
    _watch(run, every)


def _watch(run: str, every: float) -> None:
    from dbtrain.run_directory import RunDirectory

    if not _OFTENEST <= every <= _SELDOMEST:
        raise UserError(f"has to be from {_OFTENEST:g} to {_SELDOMEST:g} seconds", field="--every", value=every)
    directory = RunDirectory.open(run)
    _replace_unknown()
    if not (out.is_terminal and sys.stdin.isatty()) or out.is_dumb_terminal:
        err.print("this is no terminal with a screen and keys: one look, as of `dbtrain status`", soft_wrap=True)
        _print_status(directory)
        return
    from dbtrain.monitoring.monitor import watch_run

    watch_run(directory, out, sys.stdin.fileno(), every)


def show_status(run: str, as_json: bool) -> None:
    """Print how the run of a directory stands.

    Raises:
        UserError: it is no run directory, or cannot be read.
    """
    from dbtrain.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    if not as_json:
        _replace_unknown()
        _print_status(directory)
        return
    from dbtrain.monitoring.status import status_object

    emit_json(status_object(_read(directory), time.time()))


def _print_status(directory: RunDirectory) -> None:
    from dbtrain.monitoring.columns import Look
    from dbtrain.monitoring.monitor import glyphs_of
    from dbtrain.monitoring.status import status_lines

    look = Look(_read(directory), time.time(), glyphs_of(out))
    # Where nobody looks at a screen, nothing is left out.
    for line in status_lines(look, out.width if out.is_terminal else None):
        out.print(line, soft_wrap=True)


def _replace_unknown() -> None:
    """Names may have characters that the terminal's encoding has not."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _read(directory: RunDirectory) -> RunView:
    from dbtrain.monitoring.run_view import RunReader

    try:
        return RunReader(directory).read()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", field="RUN", value=directory.uri) from None
