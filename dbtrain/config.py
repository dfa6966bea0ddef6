"""`RunConfig`: everything that decides a run. `dbtrain.config_file` reads it from YAML.

The bare string under a field says what it is and its unit. Fields that decide the trained bytes form the run's
*identity* (`RunConfig.identity`); placement, logging and checkpoint cadence do not, and may change on resuming.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dbtrain.data_config import DataConfig
from dbtrain.model_config import ModelConfig, Section, config_class
from dbtrain.monitoring_config import MonitoringConfig
from dbtrain.resources_config import ResourcesConfig

READOUTS = ("first", "last", "product", "first_mean", "last_mean", "product_mean")
"""What can be read off the chain; `dbtrain.diffusion.chain.read_out` computes them."""

Bridge = Literal["softmax", "argmax", "sample"]


class PartitionConfig(Section):
    """How the noise axis is cut into one range a block."""

    kind: Literal["equal_probability", "uniform", "equal_information", "explicit"] = "equal_probability"
    """Equal mass of the training distribution (the paper's), equal log-width, equal shares of what a noisy code tells
    of its label or token (all of them equally likely), or the given boundaries."""
    boundaries: tuple[float, ...] | None = None
    """For `explicit`: blocks.count + 1 noise levels, from sigma_max down to sigma_min."""

    @model_validator(mode="after")
    def _consistent(self) -> PartitionConfig:
        if (self.kind == "explicit") != (self.boundaries is not None):
            raise ValueError(f"boundaries are given exactly when kind is 'explicit', and kind is {self.kind!r}")
        if self.boundaries is not None and list(self.boundaries) != sorted(set(self.boundaries), reverse=True):
            raise ValueError(f"boundaries {list(self.boundaries)} have to fall strictly, highest noise first")
        return self


class BlocksConfig(Section):
    """How the network is cut."""

    count: int = Field(3, ge=1)
    """Number of blocks, B; block 0 owns the earliest layers and the highest noise."""
    split: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Layers per block, in order; even when not given, with remainder layers to the first blocks."""
    partition: PartitionConfig = PartitionConfig()
    """How the noise axis is cut."""
    overlap: float = Field(0.05, ge=0.0, le=1.0)
    """Training range of a block is widened by this part of its log-width on both sides (the paper's gamma)."""
    stem: Literal["private", "averaged"] = "private"
    """What is outside a block's layers (embeddings, final norm, head): its own, or set to the mean over the blocks that
    train at the moment, every `average_every` steps. Averaging needs a network between workers, and bytes then depend
    on which blocks trained at the same time."""
    average_every: int = Field(25, ge=1)
    """Steps between two averagings."""
    relay_every: int | None = Field(None, ge=1)
    """Relay: a block goes on from what the blocks before it make of a sample and say of its label, by weights that are
    published and looked for every so many steps; none (the default) keeps blocks strangers to each other. It costs a
    forward pass through the layers before a block's own, and `chain.readout` is `last` where nothing else is said."""
    average_patience: float = Field(60.0, gt=0.0)
    """Seconds an averaging waits for a block that trains and has not come; then it goes on without it."""


class NoiseConfig(Section):
    """The noise levels of training: log sigma ~ N(p_mean, p_std^2) on [sigma_min, sigma_max] (Karras et al. 2022)."""

    p_mean: float = -1.2
    """Mean of log sigma."""
    p_std: float = Field(1.2, gt=0.0)
    """Standard deviation of log sigma."""
    sigma_min: float = Field(0.002, gt=0.0)
    """Lowest noise level."""
    sigma_max: float = Field(80.0, gt=0.0)
    """Highest noise level, where inference starts."""
    sigma_data: float = Field(0.5, gt=0.0)
    """Standard deviation of a clean target's coordinates that preconditioning assumes."""
    weight: Literal["unit", "edm"] = "unit"
    """Per-sample loss weight: 1, or (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2."""

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} has to be below sigma_max {self.sigma_max}")
        return self


class CodebookConfig(Section):
    """The frozen target vectors of the labels, the same for all blocks, derived from the seed."""

    scale: float = Field(1.0, gt=0.0)
    """Euclidean norm of each row. Rows are orthonormal up to scale where num_classes <= width, else random."""


class ChainConfig(Section):
    """Inference: the walk from noise to signal through the blocks."""

    steps: int | None = Field(None, ge=1)
    """Denoising steps of one walk; one a block when not given."""
    solver: Literal["euler", "heun"] = "heun"
    """How images are sampled: Euler steps, or Heun's, which ask the network twice a step (Karras et al. 2022)."""
    guidance: float = Field(1.0, ge=0.0)
    """Classifier-free guidance of images, D = D_none + guidance * (D_label - D_none); 1 turns it off."""
    bridge: Bridge = "softmax"
    """From step to step: an Euler step towards the codebook's mean under p(y), or towards its likeliest row; or the row
    of a label drawn from p(y), with fresh noise of the next level (ancestral sampling)."""
    start_noises: int = Field(8, ge=1)
    """Starting noises over which the averaged read-outs take the mean."""
    readout: str = "product"
    """The read-out whose answer `predict` gives: first, last or product, each also with `_mean`. The normalised
    geometric mean of all steps' answers does best for the price of one walk (docs/results.md)."""

    @model_validator(mode="after")
    def _known(self) -> ChainConfig:
        if self.readout not in READOUTS:
            raise ValueError(f"readout {self.readout!r} has to be one of {', '.join(READOUTS)}")
        return self


class OptimiserConfig(Section):
    """AdamW (Loshchilov, Hutter 2019) or Adafactor (Shazeer, Stern 2018)."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    """AdamW keeps two moments of every weight; Adafactor of a matrix its rows' and columns': next to nothing."""
    lr: float = Field(1e-3, gt=0.0)
    """Peak learning rate; Adafactor's steps are this part of the root mean square of a tensor (1e-2 is usual)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(0.01, ge=0.0)
    """Decoupled weight decay of matrices; vectors (biases, norms) and embeddings have none."""
    clip_norm: float | None = Field(1.0, gt=0.0)
    """Gradients are scaled down to this global norm; none turns clipping off."""


class ScheduleConfig(Section):
    """Learning rate over the steps."""

    kind: Literal["cosine", "constant"] = "cosine"
    """After warm-up: half a cosine down to min_lr, or constant."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear growth from 0 to lr."""
    min_lr: float = Field(0.0, ge=0.0)
    """Where the cosine ends."""


class EMAConfig(Section):
    """Exponential moving average of the weights."""

    half_life: int = Field(0, ge=0)
    """Samples after which a weight's share has halved; 0 turns the average off."""
    ramp_up: float = Field(0.05, ge=0.0, le=1.0)
    """Early on, the half-life is at most this part of the samples seen (Karras et al. 2022)."""


class TrainingConfig(Section):
    """How long and how."""

    steps: int = Field(ge=1)
    """Optimiser steps of each block; the end-to-end baseline takes as many, which makes layer-evaluations equal."""
    batch_size: int = Field(128, ge=1)
    """Samples a step."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a batch goes through the network, to save memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; bfloat16 through autocast, weights stay float32."""
    compile: bool = False
    """Compile the block with torch.compile."""
    recompute: bool = False
    """Activation checkpointing: keep each layer's input alone and run the layer again on the way back (Chen et al.
    2016). Less memory for a third more arithmetic."""
    max_rollbacks: int = Field(2, ge=0)
    """How often a block whose loss or weights became infinite or NaN goes back to a checkpoint and on with other
    samples, before it counts as failed."""

    @model_validator(mode="after")
    def _parts(self) -> TrainingConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        return self


class CheckpointConfig(Section):
    """When a block's state is saved."""

    every: int = Field(500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept for each block; that of a stop, if it is the newest, beside them."""


class LoggingConfig(Section):
    """What a worker tells."""

    every: int = Field(50, ge=1)
    """Steps between two lines of a block's metrics."""


class RunConfig(Section):
    """One run: a network, its data, how it is cut, and how it is trained."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run in logs and figures."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The seed of everything random."""
    model: SerializeAsAny[ModelConfig]
    """The network."""
    data: DataConfig = DataConfig()
    """The samples."""
    blocks: BlocksConfig = BlocksConfig()
    """The cut."""
    noise: NoiseConfig = NoiseConfig()
    """The noise levels."""
    codebook: CodebookConfig = CodebookConfig()
    """The targets of labels and tokens."""
    chain: ChainConfig = ChainConfig()
    """Inference."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """The optimiser."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate."""
    ema: EMAConfig = EMAConfig()
    """The averaged weights."""
    training: TrainingConfig
    """Length and precision."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """Saving."""
    resources: ResourcesConfig = ResourcesConfig()
    """What a worker gets."""
    logging: LoggingConfig = LoggingConfig()
    """What a worker tells."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """Who else is told."""

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, raw: Any) -> Any:
        """Put what fits the family where the user has said nothing."""
        model = raw.get("model") if isinstance(raw, dict) else None
        if isinstance(model, ModelConfig):
            chosen: type[ModelConfig] = type(model)
        elif isinstance(model, dict):
            try:
                chosen = config_class(model.get("family", "vit"))
            except ValueError:
                return raw  # the field's own validator says it
        else:
            return raw
        blocks, chain = raw.get("blocks"), raw.get("chain", {})
        if isinstance(blocks, dict) and blocks.get("relay_every") is not None and isinstance(chain, dict):
            raw = {**raw, "chain": {"readout": "last", **chain}}  # each answer completes those before it
        filled = {
            name: {**values, **raw.get(name, {})}
            for name, values in chosen.defaults.items()
            if isinstance(raw.get(name, {}), dict)
        }
        return {**raw, **filled}

    @field_validator("model", mode="wrap")
    @classmethod
    def _of_the_family(cls, raw: Any, handler: Any) -> ModelConfig:
        if not isinstance(raw, dict):
            if isinstance(raw, ModelConfig):
                return raw
            validated: ModelConfig = handler(raw)
            return validated
        family = raw.get("family", "vit")
        try:
            chosen = config_class(family)
        except ValueError as error:
            problem = InitErrorDetails(
                type=PydanticCustomError("family", "{why}", {"why": str(error)}), loc=("family",), input=family
            )
            raise ValidationError.from_exception_data("model", [problem]) from None
        return chosen.model_validate(raw)

    @model_validator(mode="after")
    def _cut_fits(self) -> RunConfig:
        count, bounds = self.blocks.count, self.blocks.partition.boundaries
        self.model.check_run(self)
        if bounds is not None:
            if len(bounds) != count + 1:
                raise ValueError(
                    f"blocks.partition.boundaries {list(bounds)} needs {count + 1} values for {count} blocks"
                )
            if bounds[0] != self.noise.sigma_max or bounds[-1] != self.noise.sigma_min:
                raise ValueError(
                    f"blocks.partition.boundaries {list(bounds)} have to run from "
                    f"noise.sigma_max {self.noise.sigma_max} to noise.sigma_min {self.noise.sigma_min}"
                )
        if self.training.batch_size % (self.training.accumulate * self.resources.replicas):
            raise ValueError(
                f"resources.replicas {self.resources.replicas} times training.accumulate {self.training.accumulate} "
                f"has to divide training.batch_size {self.training.batch_size}"
            )
        if self.blocks.stem == "averaged":
            self._check_averaging()
        if self.blocks.relay_every is not None:
            self._check_relay()
        if self.optimiser.kind == "adafactor" and self.resources.shard:
            raise ValueError("optimiser.kind 'adafactor' needs whole matrices: use 'adamw', or no resources.shard")
        if self.schedule.warmup_steps > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is more than training.steps {self.training.steps}"
            )
        if self.schedule.min_lr > self.optimiser.lr:
            raise ValueError(f"schedule.min_lr {self.schedule.min_lr} is above optimiser.lr {self.optimiser.lr}")
        return self

    def _check_averaging(self) -> None:
        blocks = self.blocks
        if blocks.count == 1:
            raise ValueError("blocks.stem 'averaged' needs more than the one block of blocks.count 1; use 'private'")
        if self.resources.replicas > 1:
            raise ValueError(
                f"blocks.stem 'averaged' has one worker a block: set resources.replicas {self.resources.replicas} to 1,"
                " or use 'private'"
            )
        if blocks.average_every >= self.training.steps:
            raise ValueError(
                f"blocks.average_every {blocks.average_every} has to be below training.steps {self.training.steps}: "
                "no averaging follows the last step"
            )
        if 2 * blocks.average_patience >= self.resources.step_timeout:
            raise ValueError(
                f"blocks.average_patience {blocks.average_patience:g} has to be below half of resources.step_timeout "
                f"{self.resources.step_timeout:g}: a block that waits makes no step, and counts as hung in the end"
            )

    def _check_relay(self) -> None:
        every = self.blocks.relay_every
        assert every is not None
        if not self.model.relays:
            raise ValueError(f"blocks.relay_every {every} is not for family {self.model.family!r}: leave it out")
        if self.blocks.count == 1:
            raise ValueError(
                f"blocks.relay_every {every} needs more than the one block of blocks.count 1: leave it out"
            )
        if self.resources.replicas > 1:
            raise ValueError(
                f"blocks.relay_every {every} has one worker a block: set resources.replicas "
                f"{self.resources.replicas} to 1, or leave it out"
            )
        if 2 * every >= self.training.steps:
            raise ValueError(
                f"blocks.relay_every {every} has to be below half of training.steps {self.training.steps}: a block "
                "takes what others have left one interval before"
            )
        if self.chain.steps not in (None, self.blocks.count) or self.chain.bridge != "softmax":
            raise ValueError(
                f"blocks.relay_every {every} trains on a chain of one step a block with the softmax bridge: leave out "
                f"chain.steps {self.chain.steps} and chain.bridge {self.chain.bridge!r}"
            )
        if self.blocks.stem == "averaged":
            raise ValueError(f"blocks.relay_every {every} does not go with blocks.stem 'averaged': use 'private'")

    def identity(self) -> dict[str, Any]:
        """The fields that decide the trained bytes, as plain data.

        Two configurations with the same identity may share a run directory. Left out are the run's name, where the
        shards lie and are copied to (their digest stands in the plan), placement, cadences, who is told, and how
        inference will read the model.
        """
        full = self.model_dump(mode="json")
        for section in ("name", "checkpoints", "logging", "monitoring", "chain"):
            del full[section]
        full["resources"] = {"threads": self.resources.threads, "device": self.resources.resolved_device}
        del full["data"]["path"], full["data"]["cache"]
        del full["training"]["max_rollbacks"], full["blocks"]["average_patience"]
        if self.optimiser.kind == "adamw":
            del full["optimiser"]["kind"]
        if self.blocks.stem == "private":
            del full["blocks"]["stem"], full["blocks"]["average_every"]
        if self.blocks.relay_every is None:
            del full["blocks"]["relay_every"]
        return full

    def digest(self) -> str:
        """SHA-256 of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def located(self) -> RunConfig:
        """The same run with all folders absolute, so that a worker started elsewhere finds them."""
        cache = None if self.data.cache is None else str(self.data.cache_folder)
        data = self.data.model_copy(update={"path": self.data.location, "cache": cache})
        return self.model_copy(update={"data": data, "model": self.model.located()})
