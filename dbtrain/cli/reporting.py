"""`dbtrain report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from dbtrain.cli.output import AsJson, RunPath, emit_json, err, whole_number
from dbtrain.cli.results import Device, open_runs

if TYPE_CHECKING:
    from dbtrain.monitoring.report.samples import Samples
    from dbtrain.run_directory import RunDirectory


def report(
    run: RunPath,
    baseline: Annotated[
        str | None,
        typer.Argument(metavar="[BASELINE]", help="Run of `dbtrain baseline` beside it.", show_default=False),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Where the page goes; RUN/report.html by default.", show_default=False
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            parser=whole_number("--samples"),
            help="Draw N images or texts for it, instead of those in RUN/samples.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="What drawn texts go on from.", show_default=False)
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write one HTML file: plan, losses, quality beside the baseline, memory, faults, hardware; nothing is trained."""
    from dbtrain.errors import UserError
    from dbtrain.monitoring.report.gather import gather
    from dbtrain.monitoring.report.output import check_target, write_report
    from dbtrain.monitoring.report.page import render

    directory, beside = open_runs(run, baseline)
    if to is not None:
        check_target(to)
    if prompt is not None and samples is None:
        raise UserError("goes with --samples", field="--prompt", value=prompt, mend="--samples 4")
    drawn = None if samples is None else _draw(directory, samples, prompt, device)
    found = gather(directory, beside, drawn)
    page = render(found)
    where = write_report(directory, page, to)
    if as_json:
        missing = [sentence for side in (found.ours, found.theirs) if side is not None for sentence in side.missing]
        emit_json(
            {
                "report": where,
                "bytes": len(page),
                "state": str(found.ours.view.state),
                "faults": len(found.ours.faults),
                "missing": missing,
            }
        )
        return
    typer.echo(where)
    for sentence in found.ours.missing:
        err.print(sentence, soft_wrap=True, markup=False)


def _draw(run: RunDirectory, count: int, prompt: str | None, device: str) -> Samples:
    from dbtrain.monitoring.report.samples import draw_samples

    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("sampling", total=None)
        return draw_samples(
            run,
            count,
            prompt=prompt,
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
