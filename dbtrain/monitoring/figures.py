"""Pictures of a run: the loss of every block, and the metric along the chain."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from dbtrain.inference.evaluation import SO_FAR, Evaluation, Point
from dbtrain.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MUTED = "#666666"


def draw_figures(
    run: RunDirectory, evaluation: Evaluation | None, baseline: Evaluation | None = None
) -> dict[str, str]:
    """Write figures/loss.png, and figures/chain.png where there is an evaluation; returns name -> path or URI."""
    drawn = {"loss.png": _loss(run)}
    if evaluation is not None and evaluation.chain:
        drawn["chain.png"] = _chain(run, evaluation, baseline)
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        run.storage.write_atomic(f"figures/{name}", buffer.getvalue())
    return {name: f"{run.storage.sub('figures').uri.rstrip('/')}/{name}" for name in drawn}


def loss_curve(metrics: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Steps and losses of a block, NaN for none; where a restart repeated a step, the later line counts."""
    by_step = {
        int(line["step"]): float("nan") if line["loss"] is None else float(line["loss"])
        for line in metrics
        if "event" not in line
    }
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def _loss(run: RunDirectory) -> Figure:
    figure, axes = _axes()
    for block in run.plan.blocks:
        steps, losses = loss_curve(run.block(block.index).metrics())
        name = "end to end" if block.noise is None else f"block {block.index}"
        noise = "" if block.noise is None else f"  noise {block.noise.high:.3g} to {block.noise.low:.3g}"
        axes.plot(steps, losses, linewidth=1.5, label=f"{name}{noise}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title(f"{run.config.name}: loss of each block", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _chain(run: RunDirectory, evaluation: Evaluation, baseline: Evaluation | None) -> Figure:
    figure, axes = _axes()
    positions = list(range(len(evaluation.chain)))
    metric = evaluation.metric
    scale = 100 if metric.unit == "fraction" else 1
    axes.plot(positions, [scale * p[metric.name] for p in evaluation.chain], "o-", label="along the chain")
    if evaluation.pooled:
        so_far = [scale * p[SO_FAR] for p in evaluation.chain]
        axes.plot(positions, so_far, "^--", color="tab:green", label="product so far")
    if len(evaluation.alone) == len(positions):
        alone = [scale * p[metric.name] for p in evaluation.alone]
        axes.plot(positions, alone, "s", color=_MUTED, fillstyle="none", label="block alone")
    # The two levels may coincide: the wide pale line of the baseline stays visible under the dots.
    if baseline is not None:
        level = scale * baseline.value
        axes.axhline(level, linewidth=5, color="tab:orange", alpha=0.45, label="end to end")
    best = evaluation.best
    axes.axhline(scale * evaluation.readouts[best], linestyle=":", color="black", label=f"best read-out ({best})")
    axes.set_xticks(positions, [f"block {int(p['block'])}\n{_noise(p)}" for p in evaluation.chain])
    axes.set_ylabel(f"{metric.title} on {evaluation.split}")
    axes.set_title(f"{run.config.name}: what the chain says at each step", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)  # lines may cross any corner inside
    return figure


def _noise(point: Point) -> str:
    return f"σ = {point['sigma']:.3g}" if "sigma" in point else f"t = {point['level']:.3g}"


def _axes() -> tuple[Figure, Axes]:
    # Matplotlib takes a second to import, and only this verb needs it; a bare Figure needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes
