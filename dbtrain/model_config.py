"""The `model` section of a configuration: one class a family, found by its `family` name.

A family that is not built in defines its class in its own module, as a subclass of one of these; naming that module in
`model.family` imports it. Nothing here needs PyTorch, so that mistakes in a configuration are told
at once.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from dbtrain.config import RunConfig

DataKind = Literal["image", "latent", "text"]


class Section(BaseModel):
    """A part of the configuration: frozen, strict about keys, with no silent conversions of floats to integers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """What every family's section has."""

    data_kinds: ClassVar[tuple[DataKind, ...]]
    """Kinds of shards the family can train on."""
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}
    """Values for other sections of the configuration that fit the family better than the general defaults."""

    relays: ClassVar[bool] = False
    """Whether a block of the family can go on from the features of the block before it."""

    family: str
    """Which module of `dbtrain.models` builds the network, or the full name of a module that registers a family."""
    depth: int = Field(ge=1)
    """Number of transformer layers of the whole network; the blocks share them out."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = inspect.get_annotations(cls).get("family")
        if name is not None and "Literal" in str(name):
            _CONFIGS[_literal(str(name))] = cls

    def check_run(self, run: RunConfig) -> None:
        """Whether the other sections go with this network.

        Raises:
            ValueError: they do not; the message names the field, its value and what would do.
        """
        if run.blocks.count > self.depth:
            raise ValueError(f"blocks.count {run.blocks.count} is more than the {self.depth} layers of model.depth")
        count, split = run.blocks.count, run.blocks.split
        if split is not None and (len(split) != count or sum(split) != self.depth):
            raise ValueError(
                f"blocks.split {list(split)} has to name {count} blocks whose layers add up to {self.depth}"
            )
        # Where the chain reads answers out of every block, one that never acts would be trained for nothing.
        if run.chain.steps is not None and run.chain.steps < run.blocks.count:
            raise ValueError(f"chain.steps {run.chain.steps} would skip some of the {run.blocks.count} blocks")

    def located(self) -> Self:
        """The same section with all folders absolute."""
        return self


_CONFIGS: dict[str, type[ModelConfig]] = {}


def _literal(annotation: str) -> str:
    """`vit` of `Literal["vit"]`."""
    return annotation.partition("[")[2].rstrip("]").strip("'\"")


def is_registered(family: object) -> bool:
    """Whether the family is built in, or its module was imported already."""
    return isinstance(family, str) and family in _CONFIGS


def config_class(family: object) -> type[ModelConfig]:
    """The class of the `model` section of a family.

    Raises:
        ValueError: there is no such family, or its module cannot be imported.
    """
    if not isinstance(family, str):
        raise ValueError("has to be a name")
    if family not in _CONFIGS and all(part.isidentifier() for part in family.split(".")):
        try:
            importlib.import_module(family)
        except ModuleNotFoundError as error:
            if error.name != family:  # the module is there, and imports something that is not
                raise ValueError(f"cannot be imported: {error}") from None
    if family not in _CONFIGS:
        known = ", ".join(sorted(_CONFIGS))
        raise ValueError(f"has to be one of {known}, or a module that registers a family")
    return _CONFIGS[family]


class _Attention(ModelConfig):
    """Widths of a transformer."""

    width: int = Field(ge=1)
    """Size of a token vector."""
    heads: int = Field(ge=1)
    """Attention heads; has to divide width."""
    mlp_width: int = Field(ge=1)
    """Hidden size of a layer's MLP. Explicit, because the usual factor of 4 is not what every paper used."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability of dropping a unit after attention, inside the MLP and after it."""

    @model_validator(mode="after")
    def _heads_divide(self) -> _Attention:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class ImageModelConfig(_Attention):
    """Transformers over the patches of an image."""

    image_size: int = Field(ge=1)
    """Height and width of the square input images, pixels."""
    channels: int = Field(3, ge=1)
    """Colour channels of the images."""
    patch_size: int = Field(ge=1)
    """Side of a square patch, pixels; has to divide image_size."""

    @model_validator(mode="after")
    def _patches_fit(self) -> ImageModelConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        return self


class ViTConfig(ImageModelConfig):
    """Vision transformer for classification (Dosovitskiy et al. 2021), pre-norm."""

    data_kinds = ("image",)
    relays = True

    family: Literal["vit"] = "vit"
    """Which module of `dbtrain.models` builds the network."""
    num_classes: int = Field(ge=2)
    """Number of labels; class ids run from 0 to num_classes - 1."""


class DiTConfig(ImageModelConfig):
    """Diffusion transformer (Peebles, Xie 2023) in pixel space or over latents, conditioned on the class label."""

    data_kinds = ("image", "latent")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {"noise": {"weight": "edm"}, "chain": {"steps": 18}}

    family: Literal["dit"] = "dit"
    """Which module of `dbtrain.models` builds the network."""
    num_classes: int | None = Field(None, ge=1)
    """Number of labels to condition on; none for an unconditional model."""
    label_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Part of the training labels that is replaced by "no label", which guidance needs."""

    def check_run(self, run: RunConfig) -> None:
        """Any number of chain steps will do: each goes to the block that owns its noise level."""
        super().check_run(_without_steps(run))
        if run.chain.guidance != 1.0 and (self.num_classes is None or self.label_dropout == 0.0):
            raise ValueError(
                f"chain.guidance {run.chain.guidance} needs a model that knows images with and without a label: set"
                " model.num_classes and model.label_dropout, or chain.guidance to 1"
            )
        if run.blocks.partition.kind == "equal_information":
            raise ValueError(
                "blocks.partition.kind 'equal_information' is for targets that are codes of labels or tokens, and those"
                " of this family are images: use 'equal_probability', 'uniform' or 'explicit'"
            )


class TextModelConfig(_Attention):
    """Transformers over windows of tokens."""

    data_kinds = ("text",)

    length: int = Field(ge=2)
    """Tokens in a window; that of the shards."""
    vocab_size: int = Field(ge=2)
    """Number of token ids, the document separator included; that of the shards' tokenizer."""
    separator: int | None = Field(None, ge=0)
    """Token id that ends every document, and stands before every window; the last id when not given."""

    @property
    def begin(self) -> int:
        """The token id that stands before every window."""
        return self.vocab_size - 1 if self.separator is None else self.separator

    @model_validator(mode="after")
    def _heads_even(self) -> TextModelConfig:
        if (self.width // self.heads) % 2:
            raise ValueError(f"rotary positions need an even width a head, not {self.width // self.heads}")
        return self


class LlamaConfig(TextModelConfig):
    """Causal transformers with RMSNorm, rotary positions, SwiGLU and grouped-query attention (Touvron et al. 2023)."""

    kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values; has to divide heads. As many as heads when not given."""
    rope_theta: float = Field(10000.0, gt=0.0)
    """Base of the rotary embedding's wavelengths."""
    norm_eps: float = Field(1e-5, gt=0.0)
    """Added to the mean square in RMSNorm."""
    tie_head: bool = False
    """The head's matrix is the input embedding's, inside each block."""

    @model_validator(mode="after")
    def _kv_heads_divide(self) -> LlamaConfig:
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        return self


class CausalLMConfig(LlamaConfig):
    """Llama-style language model; a block denoises the code of the next token, given the clean earlier tokens."""

    family: Literal["causal_lm"] = "causal_lm"
    """Which module of `dbtrain.models` builds the network."""
    clean_loss: float = Field(0.0, ge=0.0)
    """Weight of an ordinary next-token cross-entropy on the clean tokens, beside the denoising loss. Trains the plain
    forward pass, which is what is exported; with noisy_layers, a pretrained one is lost without it."""
    noisy_layers: int | None = Field(0, ge=0)
    """How many of a block's layers, the last ones, noisy tokens go through as a second stream beside the clean tokens;
    null for all. Each costs twice the memory and arithmetic of one that sees clean tokens alone."""
    pretrained: str | None = None
    """Folder of a Hugging Face Llama checkpoint (config.json and safetensors) whose layers the blocks start from and
    whose embedding is the codebook."""

    def located(self) -> Self:
        """The same section with the checkpoint's folder absolute."""
        if self.pretrained is None:
            return self
        return self.model_copy(update={"pretrained": str(Path(self.pretrained).expanduser().absolute())})


class RecurrentLMConfig(LlamaConfig):
    """Recurrent-depth language model (Geiping et al. 2025): a prelude, a core that is iterated, and a coda."""

    # Steps of one block are no committee.
    defaults: ClassVar[dict[str, dict[str, Any]]] = {"blocks": {"count": 1}, "chain": {"steps": 8, "readout": "last"}}

    family: Literal["recurrent_lm"] = "recurrent_lm"
    """Which module of `dbtrain.models` builds the network."""
    prelude: int = Field(1, ge=1)
    """Layers before the core."""
    coda: int = Field(1, ge=0)
    """Layers after the core. The core has the rest of depth."""
    iterations: int = Field(8, ge=1)
    """Mean number of core iterations of the end-to-end baseline in training, and of its inference."""
    backprop: int = Field(8, ge=1)
    """Last iterations of the baseline's core that gradients go through."""

    @property
    def core(self) -> int:
        """Layers of the core."""
        return self.depth - self.prelude - self.coda

    @model_validator(mode="after")
    def _core_left(self) -> RecurrentLMConfig:
        if self.core < 1:
            raise ValueError(f"prelude {self.prelude} and coda {self.coda} leave no layer of depth {self.depth}")
        return self

    def check_run(self, run: RunConfig) -> None:
        """Blocks are specialists of a noise range here: each has all layers."""
        if run.blocks.split is not None:
            raise ValueError(f"blocks.split {list(run.blocks.split)} has no meaning where every block has all layers")
        if run.chain.steps is not None and run.chain.steps < run.blocks.count:
            raise ValueError(f"chain.steps {run.chain.steps} would skip some of the {run.blocks.count} blocks")


class MaskedLMConfig(TextModelConfig):
    """Masked diffusion language model (Sahoo et al. 2024; Shi et al. 2024)."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {"blocks": {"overlap": 0.0}, "chain": {"steps": 64}}

    family: Literal["masked_lm"] = "masked_lm"
    """Which module of `dbtrain.models` builds the network."""
    mask_schedule: Literal["linear", "cosine"] = "linear"
    """alpha(t), the part of the tokens that is not masked at level t: 1 - t, or 1 - sin(pi t / 2)."""

    def check_run(self, run: RunConfig) -> None:
        """Any number of chain steps will do; ranges are always equal decrements of alpha."""
        super().check_run(_without_steps(run))
        if run.blocks.partition.kind != "equal_probability":
            raise ValueError(
                f"blocks.partition.kind {run.blocks.partition.kind!r} is for Gaussian noise; mask levels are cut at"
                " equal decrements of alpha: leave it out"
            )


def _without_steps(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"chain": run.chain.model_copy(update={"steps": None})})
