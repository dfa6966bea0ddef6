"""What a model makes, for its report: the files of `dbtrain sample`, or drawn for this page."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from dbtrain.errors import UserError
from dbtrain.monitoring.pictures import KEPT, PROMPT, kept_png
from dbtrain.run_directory import RunDirectory

if TYPE_CHECKING:
    from dbtrain.inference.generate import TextGenerator
    from dbtrain.inference.sample_images import ImageSampler
    from dbtrain.inference.unmask import TextUnmasker


@dataclass(frozen=True)
class Samples:
    """Pictures or texts."""

    about: str
    png: bytes | None = None
    texts: tuple[tuple[str, str], ...] = ()
    """Prompt, which may be empty, and what the model wrote."""


def samples_kept(run: RunDirectory) -> Samples | None:
    """The picture that `dbtrain sample` left in the run directory, if it did."""
    png = kept_png(run)
    return None if png is None else Samples(f"as `dbtrain sample` left them in {KEPT}", png)


def draw_samples(
    run: RunDirectory,
    count: int,
    *,
    prompt: str | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Ask the run's model for `count` images or texts, always the same ones.

    Raises:
        UserError: the model makes neither, the run is unfinished and not assembled, or there is no such device.
    """
    from dbtrain.inference.front_door import open_model
    from dbtrain.inference.runs import model_of
    from dbtrain.models import family_of

    task = family_of(run.config).task
    if task == "classify":
        raise UserError(
            "is of no use: the model classifies images and makes none",
            field="--samples",
            value=count,
            mend="leave it out",
        )
    if prompt is not None and task != "generate_text":
        raise UserError("is for models that go on from a text", field="--prompt", value=prompt, mend="leave it out")
    front = open_model(model_of(run, device))
    if task == "generate_images":
        return _images(cast("ImageSampler", front), count, progress)
    if task == "generate_text":
        start = PROMPT if prompt is None else prompt
        texts = cast("TextGenerator", front).generate([start] * count)
        return Samples("drawn for this report, seed 0", texts=tuple((start, text) for text in texts))
    texts = cast("TextUnmasker", front).generate(count)
    return Samples("drawn for this report, seed 0", texts=tuple(("", text) for text in texts))


def _images(sampler: ImageSampler, count: int, progress: Callable[[int, int], None] | None) -> Samples:
    from dbtrain.inference.sample_files import GRID_IMAGES, grid

    if count > GRID_IMAGES:
        raise UserError(f"has to be {GRID_IMAGES} at most", field="--samples", value=count)
    images = sampler.sample(count, progress=progress)
    if images.dtype != np.uint8:
        return Samples("the model makes latents, which only their own decoder can show")
    labels = sampler.labels_for(count, None)
    buffer = io.BytesIO()
    grid(images, None if labels is None else labels.numpy()).save(buffer, "PNG")
    return Samples("drawn for this report, seed 0", buffer.getvalue())
