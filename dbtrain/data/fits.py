"""Whether prepared data and a configured network go together."""

from __future__ import annotations

from collections.abc import Iterator

from dbtrain.config import RunConfig
from dbtrain.data_config import AugmentConfig
from dbtrain.errors import UserError
from dbtrain.model_config import DataKind, ImageModelConfig, TextModelConfig
from dbtrain.plan import DatasetFacts

_PLURAL = {"image": "images", "latent": "latents", "text": "text"}


def check_fits(facts: DatasetFacts, config: RunConfig) -> None:
    """Compare the data with the `model` and `data.augment` sections.

    Raises:
        UserError: they do not go together; the message names the field and the value that would do.
    """
    model, where = config.model, config.data.location
    if facts.kind not in model.data_kinds:
        wanted = " or ".join(_PLURAL[kind] for kind in model.data_kinds)
        raise UserError(
            f"{where} holds {_PLURAL[facts.kind]}, and this family trains on {wanted}",
            field="model.family",
            value=model.family,
            mend="choose other data with data.source and data.path, or another family",
        )
    for field, have, need, problem in _demands(facts, config):
        if have != need:
            raise UserError(f"{problem} in {where}", field=field, value=have, mend=f"set {field}={need}")
    refuse_augmentation(config.data.augment, facts.kind)


def _demands(facts: DatasetFacts, config: RunConfig) -> Iterator[tuple[str, int, int, str]]:
    """Field of the configuration, its value, the value that fits, and why."""
    model = config.model
    if isinstance(model, ImageModelConfig):
        channels, height, width = facts.shape
        things, unit = _PLURAL[facts.kind], "pixels" if facts.kind == "image" else "values"
        yield "model.image_size", model.image_size, height, f"the {things} are {height} {unit} high"
        yield "model.image_size", model.image_size, width, f"the {things} are {width} {unit} wide"
        yield "model.channels", model.channels, channels, f"the {things} have {channels} channels"
        classes = getattr(model, "num_classes", None)  # not every family has labels, and None asks for none
        if classes is not None:
            # Latents that came without labels all have the label 0.
            known = max(len(facts.class_names), 1)
            yield "model.num_classes", classes, known, f"the data has class ids 0..{known - 1}"
    elif isinstance(model, TextModelConfig):
        (length,) = facts.shape
        assert facts.vocab_size is not None
        yield "model.length", model.length, length, f"the text is packed into windows of {length} tokens"
        size = facts.vocab_size
        yield "model.vocab_size", model.vocab_size, size, f"the tokenizer knows {size} tokens"
        assert facts.separator is not None
        yield "model.separator", model.begin, facts.separator, f"documents end with the token {facts.separator}"


def refuse_augmentation(augment: AugmentConfig, kind: DataKind) -> None:
    """Distortions are for images alone.

    Raises:
        UserError: one is turned on for latents or text.
    """
    if kind == "image":
        return
    for name in AugmentConfig.model_fields:
        value = getattr(augment, name)
        if value:
            raise UserError(
                f"distorts images, and the data is {_PLURAL[kind]}",
                field=f"data.augment.{name}",
                value=value if isinstance(value, int) else None,
                mend="leave data.augment out",
            )
