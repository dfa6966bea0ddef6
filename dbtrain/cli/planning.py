"""`dbtrain plan`: what a run would be, without starting it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbtrain.cli.output import (
    AsJson,
    ConfigFile,
    Overrides,
    emit_json,
    parse_bytes,
    print_table,
    report,
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
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time 20 steps on this device: how long training will take.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show layers, noise range, parameters and bytes of each block; writes nothing."""
    changes = list(overrides or [])
    if blocks is not None:
        changes += [f"blocks.count={blocks}", "blocks.split=null"]
    run = load_config(config, changes)
    budget = None if memory is None else parse_bytes(memory)

    from dbtrain.training.planner import make_plan

    made = make_plan(run)
    whole = make_plan(run, "end_to_end")
    fits = None if budget is None else _counts_that_fit(run, budget)
    times = _times(run, made, whole) if calibrate else None
    if as_json:
        result = made.model_dump(mode="json")
        result["layer_evaluations"] = made.layer_evaluations
        result["end_to_end"] = whole.model_dump(mode="json")["blocks"][0]
        if fits is not None:
            result["fits"] = {"memory": budget, "blocks": fits}
        if times is not None:
            result["calibration"] = times
        emit_json(result)
        return
    _print(made, whole)
    if fits is not None:
        several = ", ".join(map(str, fits))
        answer = f"B = {several}" if fits else f"no B up to {run.model.depth}; lower training.batch_size"
        typer.echo(f"Fits in {human_bytes(budget or 0)} a worker: {answer}")
    if times is not None:
        _print_times(times, len(made.blocks))


def _times(run: RunConfig, made: Plan, whole: Plan) -> dict[str, Any]:
    """Of the costliest block and of the end-to-end network; of the latter none, and why, where it does not fit."""
    from dbtrain.training.calibration import STEPS, costliest, seconds_a_step

    device, threads = run.resources.resolved_device, run.resources.threads
    report(f"timing {STEPS} steps of block {costliest(made).index} and of the network end to end on this {device}")
    times: dict[str, Any] = {"device": device, "threads": threads, "steps": STEPS}
    for name, plan in (("block", made), ("end_to_end", whole)):
        block = costliest(plan)
        found: dict[str, Any] = {"index": block.index, "bytes": block.bytes.total, "steps": plan.steps}
        try:
            seconds = seconds_a_step(run, plan)
        except UserError as error:
            if plan is made:
                raise
            found |= {"seconds_per_step": None, "hours": None, "reason": str(error)}
        else:
            found |= {"seconds_per_step": seconds, "hours": seconds * plan.steps / 3600}
        times[name] = found
    return times


def _print_times(times: dict[str, Any], count: int) -> None:
    from dbtrain.monitoring.terminal import duration

    threads = f"{times['threads']} thread{'' if times['threads'] == 1 else 's'}"
    typer.echo(f"on this {times['device']}, {threads}:")
    names = {"block": f"B = {count} needs", "end_to_end": "end to end needs"}
    for key, needs in names.items():
        found = times[key]
        if found["hours"] is None:
            typer.echo(f"  end to end: {found['reason']}")
            continue
        each = " a worker" if key == "block" else ""
        took = f"{found['steps']:,} steps of {found['seconds_per_step']:.3g} s"
        took += f" (block {found['index']})" if key == "block" else ""
        typer.echo(f"  {needs} {human_bytes(found['bytes'])} and {duration(found['hours'] * 3600)}{each}: {took}")


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
                human_bytes(size.parameters),
                human_bytes(size.optimiser + size.ema),
                human_bytes(size.gradients + size.activations + size.temporary),
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
            "weights",
            "optimiser\n+ EMA",
            "made in\na step",
            "peak",
            "MFLOP\n/sample",
        ],
        rows,
    )
    typer.echo("the last line is the network end to end, as `dbtrain baseline` trains it")
    typer.echo(f"layer-evaluations: {made.layer_evaluations:,} (end to end: {whole.layer_evaluations:,})")
    if made.codebook_sha256 is not None:
        typer.echo(f"codebook: {made.codebook_sha256}")
