"""The section `monitoring` of a configuration: who is told of a run, beside the run directory, which always is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dbtrain.model_config import Section

WandbMode = Literal["off", "offline", "online"]


def _yaml_off(value: object) -> object:
    """YAML reads the word off as false."""
    return "off" if value is False else value


class MonitoringConfig(Section):
    """Sinks. None of them touches the trained bytes, or can slow or fail training."""

    wandb: Annotated[WandbMode, BeforeValidator(_yaml_off)] = "off"
    """Weights & Biases: nothing, into files that `wandb sync` sends later, or to its service."""
    wandb_project: str = Field("dbtrain", min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")
    """W&B project of the runs."""
    wandb_entity: str | None = Field(None, min_length=1)
    """W&B user or team; the account's default when not given."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run directory, which has to be on this machine."""
    prometheus: bool = True
    """With the Ray backend: put each block's figures among the metrics that the cluster's nodes export."""
    patience: float = Field(30.0, gt=0.0)
    """Seconds that `train` and `evaluate` wait at their end for W&B and TensorBoard to take what is left."""
