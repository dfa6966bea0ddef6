"""The options of `dbtrain monitor RUN --web`, and the page it serves."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dbtrain.cli.output import emit_json, err

PORT, LOOPBACK = 8090, "127.0.0.1"

Port = Annotated[int, typer.Option("--port", help="Of the page; 0 takes any that is free.", min=0, max=65535)]
Bind = Annotated[
    str, typer.Option("--bind", metavar="ADDRESS", help="Where the page is served; other than loopback needs --token.")
]
Token = Annotated[
    str | None,
    typer.Option("--token", help="Of the page's address, instead of DBTRAIN_TOKEN or a new one.", show_default=False),
]
Samples = Annotated[
    float | None,
    typer.Option(
        "--samples",
        metavar="SECONDS",
        help="Draw samples from new checkpoints, at most so often, in another process.",
        min=1,
        show_default=False,
    ),
]


def serve_web(run: str, port: int, bind: str, token: str | None, samples: float | None, as_json: bool) -> None:
    """Serve the page until Ctrl-C or SIGTERM; its address, token included, is printed first."""
    from dbtrain.monitoring.web.address import TOKEN_VARIABLE, address_of
    from dbtrain.monitoring.web.server import serve
    from dbtrain.run_directory import RunDirectory

    address = address_of(bind, port, token if token is not None else os.environ.get(TOKEN_VARIABLE))
    directory = RunDirectory.open(run)

    def ready(url: str) -> None:
        if as_json:
            emit_json({"run": directory.uri, "url": url})
            return
        typer.echo(url)
        err.print("open it in a browser; Ctrl-C ends the monitor, not the run", soft_wrap=True)

    serve(directory, address, samples=samples, ready=ready)
