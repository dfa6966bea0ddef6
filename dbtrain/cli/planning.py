"""`dbtrain plan`: what a run would be, without starting it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dbtrain.cli.output import (
    AsJson,
    ConfigFile,
    Overrides,
    emit_json,
    parse_bytes,
    print_table,
    whole_number,
)
from dbtrain.config_file import load_config
from dbtrain.errors import UserError
from dbtrain.plan import human_bytes

if TYPE_CHECKING:
    from dbtrain.config import RunConfig
    from dbtrain.plan import Plan


def plan(
    config: ConfigFile,
    blocks: Annotated[
        int | None,
        typer.Option(
            "--blocks",
            metavar="B",
            parser=whole_number("--blocks"),
            help="Number of blocks, instead of blocks.count.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="A worker's memory, such as 8GB: which B fits?", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show layers, noise range, parameters and bytes of each block; trains nothing."""
    changes = list(overrides or [])
    if blocks is not None:
        changes += [f"blocks.count={blocks}", "blocks.split=null"]
    run = load_config(config, changes)
    budget = None if memory is None else parse_bytes(memory)

    from dbtrain.training.planner import make_plan

    made = make_plan(run)
    whole = make_plan(run, "end_to_end")
    fits = None if budget is None else _counts_that_fit(run, budget)
    if as_json:
        result = made.model_dump(mode="json")
        result["layer_evaluations"] = made.layer_evaluations
        result["end_to_end"] = whole.model_dump(mode="json")["blocks"][0]
        if fits is not None:
            result["fits"] = {"memory": budget, "blocks": fits}
        emit_json(result)
        return
    _print(made, whole)
    if fits is not None:
        several = ", ".join(map(str, fits))
        answer = f"B = {several}" if fits else f"no B up to {run.model.depth}; lower training.batch_size"
        typer.echo(f"Fits in {human_bytes(budget or 0)} a worker: {answer}")


def _counts_that_fit(run: RunConfig, budget: float) -> list[int]:
    """Numbers of blocks whose largest block needs no more than `budget` bytes."""
    from dbtrain.training.planner import make_plan

    if run.blocks.partition.kind == "explicit":
        raise UserError(
            "cannot try other numbers of blocks with explicit boundaries",
            field="blocks.partition.kind",
            value="explicit",
            mend="leave out --memory, or use equal_probability",
        )
    fitting = []
    for count in range(1, run.model.depth + 1):
        cut = run.blocks.model_copy(update={"count": count, "split": None})
        try:
            tried = make_plan(run.model_copy(update={"blocks": cut}))
        except UserError:  # so many blocks that one of them would have no noise to train on
            continue
        if max(block.bytes.total for block in tried.blocks) <= budget:
            fitting.append(count)
    return fitting


def _print(made: Plan, whole: Plan) -> None:
    rows = []
    for block in (*made.blocks, *whole.blocks):
        size, noise = block.bytes, block.noise
        rows.append(
            [
                str(block.index) if noise is not None else "all",
                f"{block.layers[0]}-{block.layers[1] - 1}",
                "-" if noise is None else f"{noise.high:.3g}..{noise.low:.3g}",
                f"{block.parameters:,}",
                human_bytes(size.parameters + size.gradients),
                human_bytes(size.optimiser + size.ema),
                human_bytes(size.activations),
                human_bytes(size.total),
                f"{block.flops_per_sample / 1e6:.1f}",
            ]
        )
    # Two lines a heading keep the table within 80 columns.
    print_table(
        f"{made.name}: {len(made.blocks)} blocks, {made.steps} steps of {made.batch_size} samples each",
        [
            "block",
            "layers",
            "noise",
            "parameters",
            "weights\n+ grads",
            "optimiser\n+ EMA",
            "acti-\nvations",
            "total",
            "MFLOP\n/sample",
        ],
        rows,
    )
    typer.echo("the last line is the network end to end, as `dbtrain baseline` trains it")
    typer.echo(f"layer-evaluations: {made.layer_evaluations:,} (end to end: {whole.layer_evaluations:,})")
    if made.codebook_sha256 is not None:
        typer.echo(f"codebook: {made.codebook_sha256}")
