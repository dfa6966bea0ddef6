"""`dbtrain assemble`, `evaluate`, `predict`, `compare`, `figures`: from trained blocks to answers."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from dbtrain.cli.output import AsJson, RunPath, emit_json, err, print_table
from dbtrain.errors import UserError
from dbtrain.inference.evaluation import SO_FAR, titles
from dbtrain.plan import human_bytes

if TYPE_CHECKING:
    from dbtrain.data.manifest import Split
    from dbtrain.inference.evaluation import Evaluation, Metric, Point
    from dbtrain.run_directory import RunDirectory


class WeightsChoice(StrEnum):
    """Which of a block's weights."""

    ema = "ema"
    raw = "raw"


class SplitChoice(StrEnum):
    """Which rows."""

    test = "test"
    train = "train"


Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="RUN", help="End-to-end run beside it.", show_default=False),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DIR", help="Prepared shards, folder or URI, if they have moved.", show_default=False
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where inference runs, such as cpu or cuda.")]


def assemble(
    run: RunPath,
    weights: Annotated[
        WeightsChoice | None,
        typer.Option("--weights", help="Averaged or last ones; averaged if kept.", show_default=False),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take unfinished blocks as far as they are, also while they train.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Stitch the trained blocks of a run into one model."""
    from dbtrain.assembly.assemble import assemble as assemble_run
    from dbtrain.run_directory import RunDirectory

    made = assemble_run(RunDirectory.open(run), None if weights is None else weights.value, partial)
    if as_json:
        emit_json(asdict(made))
        return
    typer.echo(
        f"{made.path}: {made.blocks} blocks, {made.parameters:,} parameters, {human_bytes(made.bytes)}, "
        f"{made.weights} weights\nsha256 {made.sha256}"
    )
    if made.partial:
        typer.echo(f"partial: the blocks have reached steps {', '.join(map(str, made.steps))}")


def evaluate(
    run: RunPath,
    baseline: Baseline = None,
    split: Annotated[SplitChoice, typer.Option("--split", help="Rows to evaluate on.")] = SplitChoice.test,
    data: Data = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """The metric by read-out, by step of the chain, and by block alone; a baseline also scores generated text."""
    from dbtrain.monitoring.sinks import send_assembly

    directory, beside = open_runs(run, baseline)
    ours = _evaluation(directory, device, data, split.value, judge=beside, renew=True)
    theirs = None if beside is None else _evaluation(beside, device, data, split.value, renew=True)
    for evaluated in (directory, beside):
        if evaluated is not None:
            send_assembly(evaluated)
    if as_json:
        result: dict[str, Any] = {"run": run, **ours.as_json()}
        if theirs is not None:
            result["baseline"] = {"run": baseline, **theirs.as_json()}
        emit_json(result)
        return
    show = ours.metric.show
    rows = [
        [name + (" (in use)" if name == ours.predict and len(ours.readouts) > 1 else ""), show(value)]
        for name, value in ours.readouts.items()
    ]
    if theirs is not None:
        rows += [[f"baseline: {name}", show(value)] for name, value in theirs.readouts.items()]
    title = f"{ours.metric.title} on {ours.rows} {ours.split} rows, {ours.metric.better} is better"
    print_table(title, ["read-out", ours.metric.title], rows)
    _print_points("along the chain", ours.chain, ours.metric)
    _print_points("each block alone", ours.alone, ours.metric)
    if ours.without:
        readouts = [name for name in ours.without[0] if name != "block"]
        rows = [[str(int(point["block"])), *(show(point[name]) for name in readouts)] for point in ours.without]
        print_table(f"the chain without a block: {ours.metric.title}", ["without", *readouts], rows)
    if ours.calibration:
        rows = [[name, f"{100 * value:.2f}"] for name, value in ours.calibration.items()]
        if theirs is not None:
            rows += [[f"baseline: {name}", f"{100 * value:.2f}"] for name, value in theirs.calibration.items()]
        print_table("calibration", ["read-out", "expected error, %"], rows)
    if ours.also:
        print_table("also", ["", "value"], [[name, f"{value:.4g}"] for name, value in ours.also.items()])


def predict(
    run: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, run directory, or hf:OWNER/NAME.", show_default=False)
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    readout: Annotated[
        str | None, typer.Option("--readout", help="Instead of chain.readout.", show_default=False)
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Classify image files."""
    import dbtrain

    model = dbtrain.load(run, device)
    if not hasattr(model, "predict"):
        raise UserError("classifies nothing", field="MODEL", value=run, mend="use `dbtrain sample`")
    answers = model.predict(list(images), readout=readout)
    if as_json:
        found = [{"image": str(path), **asdict(answer)} for path, answer in zip(images, answers, strict=True)]
        emit_json({"predictions": found})
        return
    for path, answer in zip(images, answers, strict=True):
        typer.echo(f"{path}\t{answer.label}\t{answer.probability:.3f}")


def compare(
    run: RunPath,
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help="Run of `dbtrain baseline`.", show_default=False)],
    data: Data = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Quality, parameters, bytes a worker, layer-evaluations and time, side by side."""
    from dbtrain.inference.compare import compare as compare_runs
    from dbtrain.inference.evaluation import Metric

    ours, theirs = open_runs(run, baseline)
    assert theirs is not None
    result = compare_runs(ours, _evaluation(ours, device, data), theirs, _evaluation(theirs, device, data))
    if as_json:
        emit_json(result)
        return
    a, b, metric = result["run"], result["baseline"], Metric(**result["metric"])
    rows = [
        [title, show(a[key]), show(b[key])]
        for title, key, show in (
            (f"{metric.title}, as used", "value", metric.show),
            (f"{metric.title}, best read-out", "best", metric.show),
            ("best read-out", "best_readout", str),
            ("parameters, all blocks", "parameters", lambda v: f"{v:,}"),
            ("bytes of the largest worker", "largest_worker_bytes", human_bytes),
            ("layer-evaluations", "layer_evaluations", lambda v: f"{v:,}"),
            ("FLOPs of the training", "flops", lambda v: f"{v:.3g}"),
            ("wall time, s", "wall_seconds", lambda v: f"{v:.1f}"),
            ("worker time, s", "worker_seconds", lambda v: f"{v:.1f}"),
        )
    ]
    heads = [_what(directory) for directory in (ours, theirs)]
    print_table(f"{run} beside {baseline}", ["", *heads], rows)


def figures(run: RunPath, baseline: Baseline = None, data: Data = None, as_json: AsJson = False) -> None:
    """Draw loss per block and the metric along the chain, as PNG files in the run's `figures` folder."""
    from dbtrain.monitoring.figures import draw_figures

    directory, beside = open_runs(run, baseline)
    theirs = None if beside is None else _evaluation(beside, "cpu", data)
    drawn = draw_figures(directory, _evaluation(directory, "cpu", data), theirs)
    if as_json:
        emit_json(drawn)
        return
    for path in drawn.values():
        typer.echo(path)


def _what(run: RunDirectory) -> str:
    return "end to end" if run.plan.kind == "end_to_end" else f"{len(run.plan.blocks)} blocks"


def open_runs(run: str, baseline: str | None) -> tuple[RunDirectory, RunDirectory | None]:
    """Both run directories, known to go together."""
    from dbtrain.inference.compare import check_baseline
    from dbtrain.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    if baseline is None:
        return directory, None
    beside = RunDirectory.open(baseline)
    check_baseline(directory, beside)
    return directory, beside


def _evaluation(
    run: RunDirectory,
    device: str,
    data: str | None,
    split: Split = "test",
    *,
    judge: RunDirectory | None = None,
    renew: bool = False,
) -> Evaluation:
    """The run's evaluation, with a progress bar on a terminal if it takes work."""
    from dbtrain.inference.runs import evaluation_of

    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)
        return evaluation_of(
            run,
            device=device,
            split=split,
            data=data,
            judge=judge,
            renew=renew,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _print_points(title: str, points: tuple[Point, ...], metric: Metric) -> None:
    if not points:
        return
    columns = list(points[0])
    heads = titles(metric)
    rows = [[_cell(name, point[name], metric) for name in columns] for point in points]
    print_table(title, [heads.get(name, name) for name in columns], rows)


def _cell(name: str, value: float, metric: Metric) -> str:
    if name == "block":
        return str(int(value))
    return metric.show(value) if name in (metric.name, SO_FAR) else f"{value:.4g}"
