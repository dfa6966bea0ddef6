"""The report's pictures as inline SVG: losses, noise ranges, the chain, memory. What is written in them is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from dbtrain.inference.evaluation import SO_FAR, Evaluation, Point
from dbtrain.monitoring.report.axes import WIDTH, Frame, frame, number, path, scale_of
from dbtrain.monitoring.run_view import BlockView, Mark, RunView
from dbtrain.plan import BlockPlan, human_bytes

POINTS = 250
"""Of a curve, at most."""
_STOPS = ((112, 72, 196), (52, 104, 212), (18, 140, 178), (26, 152, 106), (116, 152, 28), (200, 132, 10))
"""Colours from high noise to low: about equally dark, so that they are seen on white and on black, and in an order that
does not need red and green to be told apart."""
_MARKS = {
    "restart": ("M0 -5L5 4L-5 4Z", "restart"),
    "rollback": ("M0 -5L5 0L0 5L-5 0Z", "roll-back"),
    "failure": ("M-4 -4L4 4M4 -4L-4 4", "given up"),
}
BASELINE = "#c2560c"
"""Colour of the end-to-end network."""
PARTS = ("parameters", "gradients", "optimiser", "ema", "activations", "temporary", "gathered", "buffers")
"""Of a worker's planned bytes, in the order in which they are drawn."""


def colour(index: int, count: int) -> str:
    """Of block `index`."""
    place = 0.0 if count == 1 else index / (count - 1) * (len(_STOPS) - 1)
    first = min(int(place), len(_STOPS) - 2)
    share = place - first
    mixed = (round(a + share * (b - a)) for a, b in zip(_STOPS[first], _STOPS[first + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def all_losses(view: RunView) -> Markup | None:
    """Every block's loss in one plot; None where nothing was told."""
    curves = [(block, *block.losses.thinned(POINTS)) for block in view.blocks]
    xs = [float(step) for _, steps, _ in curves for step in steps]
    ys = [value for _, _, values in curves for value in values]
    if not any(map(math.isfinite, ys)):
        return None
    at = frame([0.0, *xs], ys, "step", "training loss")
    lines = [
        Markup('<path d="{}" fill="none" stroke="{}" stroke-width="1.6"><title>{}</title></path>').format(
            path(at, steps, values), colour(block.index, len(view.blocks)), block_name(block.layout)
        )
        for block, steps, values in curves
    ]
    return at.draw(Markup("").join(lines), f"training loss of {len(curves)} blocks by step")


def block_loss(block: BlockView, stroke: str) -> Markup | None:
    """One block's loss in that colour, with what happened to it; None where nothing was told."""
    steps, values = block.losses.thinned(POINTS)
    if not any(map(math.isfinite, values)):
        return None
    marked = [float(mark.step) for mark in block.marks]
    at = frame([0.0, *steps, *marked], values, "step", "training loss")
    line = Markup('<path d="{}" fill="none" stroke="{}" stroke-width="1.6"/>').format(path(at, steps, values), stroke)
    marks = Markup("").join(_mark(at, mark) for mark in block.marks)
    return at.draw(line + marks, f"training loss of {block_name(block.layout)} by step")


def _mark(at: Frame, mark: Mark) -> Markup:
    shape, name = _MARKS[mark.kind]
    return Markup(
        '<g class="mark {kind}" transform="translate({x:.1f} {y:.1f})"><title>{name} at step {step}: {text}</title>'
        '<line y1="{up:.1f}" y2="0"/><path d="{shape}"/></g>'
    ).format(
        kind=mark.kind,
        x=at.x.at(mark.step),
        y=at.y.start - 5,
        up=at.y.end - at.y.start + 5,
        name=name,
        step=mark.step,
        text=mark.text,
        shape=shape,
    )


def noise_axis(blocks: Sequence[BlockPlan]) -> Markup | None:
    """Which block owns which noise; None where there is one without."""
    owned = [(block, block.noise, block.trained or block.noise) for block in blocks if block.noise is not None]
    if not owned:
        return None
    levels = [level for _, noise, trained in owned for level in (noise.low, noise.high, trained.low, trained.high)]
    log = min(levels) > 0 and max(levels) > 1
    # High noise to the left: the way inference goes.
    x = scale_of(levels, WIDTH - 12, 12, room=0.0, log=log)
    row = max(4, min(14, 150 // len(owned)))
    height = len(owned) * row + 46
    bars = [
        Markup(
            '<g fill="{c}"><title>{title}</title>'
            '<rect x="{ta:.1f}" y="{y}" width="{tw:.1f}" height="{h}" opacity="0.35"/>'
            '<rect x="{a:.1f}" y="{y}" width="{w:.1f}" height="{h}"/></g>'
        ).format(
            title=f"{block_name(block)}: {noise.high:.4g} to {noise.low:.4g}",
            ta=x.at(trained.high),
            tw=x.at(trained.low) - x.at(trained.high),
            a=x.at(noise.high),
            w=max(1.0, x.at(noise.low) - x.at(noise.high)),
            y=20 + position * row,
            h=row - 2,
            c=colour(block.index, len(blocks)),
        )
        for position, (block, noise, trained) in enumerate(owned)
    ]
    ticks = [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x.at(value), height - 16, number(value))
        for value in x.ticks()
    ]
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" class="plot"><title>noise ranges of the blocks</title>'
        '<text x="2" y="11" class="name">noise level, highest first{log}</text>{bars}{ticks}</svg>'
    ).format(w=WIDTH, h=height, log=" (log)" if log else "", bars=Markup("").join(bars), ticks=Markup("").join(ticks))


def chain(evaluation: Evaluation, baseline: Evaluation | None) -> Markup | None:
    """The metric at every step of the chain, of all steps so far, and of each block alone, with the end-to-end
    network's level."""
    metric = evaluation.metric
    points = evaluation.chain
    if not points:
        return None
    factor = 100 if metric.unit == "fraction" else 1
    steps = [factor * point[metric.name] for point in points]
    alone = [factor * point[metric.name] for point in evaluation.alone] if len(evaluation.alone) == len(points) else []
    so_far = [factor * point[SO_FAR] for point in points] if evaluation.pooled else []
    level = [] if baseline is None else [factor * baseline.value]
    used = factor * evaluation.value
    if not any(map(math.isfinite, [*steps, *alone, *so_far])):
        return None
    xs = [float(n) for n in range(len(points))]
    at = frame(xs, [*steps, *alone, *so_far, *level, used], "", f"{metric.title} on {evaluation.split}", x_room=0.08)
    inside = Markup("")
    for value, kind, name in [*((v, "baseline", "end to end") for v in level), (used, "used", "as used")]:
        inside += Markup(
            '<line x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="{}"><title>{}</title></line>'
        ).format(at.x.start, at.x.end, kind, f"{name}: {value:.4g}", y=at.y.at(value))
    inside += Markup('<path d="{}" class="along"/>').format(path(at, xs, steps))
    series = ((alone, "alone", "alone"), (so_far, "sofar", "product so far"), (steps, "step", "along the chain"))
    for values, kind, name in series:
        for n, value in enumerate(values):
            if math.isfinite(value):
                inside += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="{}"><title>{}</title></circle>').format(
                    at.x.at(n), at.y.at(value), kind, f"{name}, block {int(points[n]['block'])}: {value:.4g}"
                )
    every = math.ceil(len(points) / 6)
    labels = [(float(n), f"block {int(p['block'])}\n{_level(p)}") for n, p in enumerate(points) if n % every == 0]
    return at.draw(inside, f"{metric.title} along the chain", labels)


def memory(rows: Sequence[tuple[str, BlockPlan]]) -> Markup:
    """Planned bytes of each worker by part, one bar for each of the named `rows`."""
    most = max(block.bytes.total for _, block in rows)
    row, left = (22, 82) if len(rows) <= 12 else (12, 82)
    drawn = []
    for position, (name, block) in enumerate(rows):
        x, y = float(left), position * row + 4
        bars = Markup("")
        for number_of, part in enumerate(PARTS):
            size = getattr(block.bytes, part)
            width = size / most * (WIDTH - left - 64)
            if size:
                bars += Markup(
                    '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" class="part{}"><title>{}</title></rect>'
                ).format(x, y, width, row - 5, number_of, f"{name}, {part}: {human_bytes(size)}")
            x += width
        drawn.append(
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>{}<text x="{:.1f}" y="{}">{}</text>').format(
                left - 6, y + row - 9, name, bars, x + 5, y + row - 9, human_bytes(block.bytes.total)
            )
        )
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" class="plot"><title>planned memory of a worker</title>{}</svg>'
    ).format(WIDTH, len(rows) * row + 6, Markup("").join(drawn))


def block_name(block: BlockPlan) -> str:
    """For people."""
    return "end to end" if block.noise is None else f"block {block.index}"


def _level(point: Point) -> str:
    sign = {"sigma": "σ", "level": "t"}
    return "".join(f"{sign[name]} {point[name]:.3g}" for name in sign if name in point)
