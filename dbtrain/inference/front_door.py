"""The object a user holds: what an assembled model can be asked, by the task of its family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbtrain.assembly.loading import AssembledModel
from dbtrain.models import family_of

if TYPE_CHECKING:
    from dbtrain.inference.classify import Classifier
    from dbtrain.inference.generate import TextGenerator
    from dbtrain.inference.sample_images import ImageSampler
    from dbtrain.inference.unmask import TextUnmasker

    FrontDoor = Classifier | ImageSampler | TextGenerator | TextUnmasker


def open_model(model: AssembledModel) -> FrontDoor:
    """A `Classifier`, `ImageSampler`, `TextGenerator` or `TextUnmasker` around the model."""
    task = family_of(model.config).task
    if task == "classify":
        from dbtrain.inference.classify import Classifier

        return Classifier(model)
    if task == "generate_images":
        from dbtrain.inference.sample_images import ImageSampler

        return ImageSampler(model)
    if task == "generate_text":
        from dbtrain.inference.generate import TextGenerator

        return TextGenerator(model)
    from dbtrain.inference.unmask import TextUnmasker

    return TextUnmasker(model)
