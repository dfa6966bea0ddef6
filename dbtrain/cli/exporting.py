"""`dbtrain export`: a language model for other libraries."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dbtrain.cli.output import AsJson, emit_json, err
from dbtrain.plan import human_bytes


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory or model folder.", show_default=False)],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="New or empty folder for the export.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Write a causal language model as a Hugging Face Llama: of blocks, the plain forward pass through all layers."""
    from dbtrain.assembly.export import export as export_model
    from dbtrain.inference.runs import model_at

    made = export_model(model_at(run), out)
    if as_json:
        emit_json(asdict(made))
        return
    typer.echo(f"{made.path}: {made.parameters:,} parameters, {human_bytes(made.bytes)}")
    if made.clean_path:
        err.print("this is the plain forward pass through all layers, not the denoising chain", soft_wrap=True)
    if not made.tokenizer:
        err.print("tokens are bytes: the folder has no tokenizer", soft_wrap=True)
