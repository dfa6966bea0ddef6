"""`dbtrain export`: a model for others."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from dbtrain.cli.output import AsJson, emit_json, err
from dbtrain.errors import UserError
from dbtrain.plan import human_bytes


class FormatChoice(StrEnum):
    """Who can read the folder."""

    dbtrain = "dbtrain"
    llama = "llama"


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run directory, model folder, or hf:OWNER/NAME.", show_default=False)
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="New or empty folder for the export.", show_default=False)
    ],
    format: Annotated[
        FormatChoice | None,
        typer.Option(
            "--format",
            help="`dbtrain`: the model, for dbtrain.load. `llama`: a Hugging Face Llama, which is the default of a"
            " causal LM; of blocks, the plain forward pass through all layers.",
            show_default=False,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="For the model card: apache-2.0, mit, ...", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="OWNER/NAME", help="Upload the folder to the Hugging Face hub.", show_default=False
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a repository for you alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as a folder for others: safetensors, config.json and a model card."""
    from dbtrain.assembly.card import Beside
    from dbtrain.assembly.export import export as export_model
    from dbtrain.assembly.hub import check_push
    from dbtrain.assembly.hub import push as push_folder
    from dbtrain.inference.runs import evaluation_at, model_at

    if private and push is None:
        raise UserError("says who sees what is pushed", field="--private", mend="add --push OWNER/NAME")
    if push is not None:
        check_push(push)
    model = model_at(run)
    beside = Beside(evaluation_at(run, model), license, None if push is None else f"hf:{push}")
    made = export_model(model, out, None if format is None else format.value, beside)
    result: dict[str, Any] = asdict(made)
    if push is not None:
        result["url"] = push_folder(made.path, push, private=private)
    if as_json:
        emit_json(result)
        return
    typer.echo(f"{made.path}: {made.parameters:,} parameters, {human_bytes(made.bytes)}, {made.weights} weights")
    if push is not None:
        typer.echo(result["url"])
    if made.clean_path:
        err.print("this is the plain forward pass through all layers, not the denoising chain", soft_wrap=True)
    if made.format == "llama" and not made.tokenizer:
        err.print("tokens are bytes: the folder has no tokenizer", soft_wrap=True)
