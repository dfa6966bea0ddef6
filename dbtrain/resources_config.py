"""The section `resources` of a configuration: what one worker gets, where it goes, and when it is given up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dbtrain.model_config import Section

_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


class ResourcesConfig(Section):
    """What one worker gets. Only `threads` and `device` touch the trained bytes; the rest is placement.

    (With several replicas of a block float sums are taken in another order: its bytes depend on their number.)
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a block trains; auto takes a GPU when `gpus` is above 0."""
    cpus: float = Field(1.0, ge=0.0)
    """CPUs that Ray reserves for one worker."""
    gpus: float = Field(0.0, ge=0.0)
    """GPUs that Ray reserves for one worker; fractions share a GPU."""
    accelerator: str | None = Field(None, min_length=1)
    """Type of accelerator a worker's node must have, by Ray's name, such as H100; any when not given."""
    custom: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    """Further resources that Ray reserves for one worker, by the names that the nodes were started with."""
    nodes: Literal["pack", "spread"] = "pack"
    """Fill one node after the other, or spread workers over nodes."""
    threads: int = Field(1, ge=1)
    """Threads of PyTorch in one worker; float sums depend on it, so it belongs to the run's identity."""
    workers: int | None = Field(None, ge=1)
    """At most this many workers at once; as many as fit when not given."""
    replicas: int = Field(1, ge=1)
    """Workers that train one block together, each on its share of every batch; `dbtrain scale` changes it for a block
    of a live run."""
    shard: bool = False
    """Replicas keep a part of weights and optimiser state each (FSDP2) rather than all of them (DDP)."""
    interleave: int | None = Field(None, ge=1)
    """With fewer workers than blocks: steps after which a block makes room for one that waits, so that all advance; a
    block keeps its worker to its end when not given."""
    max_restarts: int = Field(5, ge=0)
    """How often in a row a block is restarted without a new checkpoint in between, before it counts as failed."""
    start_timeout: float = Field(120.0, gt=0.0)
    """Seconds a worker may take to start."""
    heartbeat_timeout: float = Field(60.0, gt=0.0)
    """Seconds a worker may leave a question unanswered; after that it is killed and started again."""
    step_timeout: float = Field(1800.0, gt=0.0)
    """Seconds a worker may answer without a new step, once its block is built; after that it is killed and started
    again."""
    slow_factor: float = Field(3.0, gt=1.0)
    """A worker is slow if it takes this many times as long for a layer as the median worker does."""
    slow_action: Literal["report", "move"] = "report"
    """Tell of a slow worker, or also train its block on another node if there is room."""

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        """`device` with auto decided by what the worker is given."""
        if self.device == "auto":
            return "cuda" if self.gpus > 0 else "cpu"
        return self.device

    @model_validator(mode="after")
    def _consistent(self) -> ResourcesConfig:
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus:g} has to be a whole number, or below 1: a part of one GPU")
        ours = [name for name in self.custom if name in _RAYS_OWN or name.startswith(("node:", "accelerator_type:"))]
        if ours:
            raise ValueError(f"custom {ours[0]!r} is Ray's own name; use the fields cpus, gpus and accelerator")
        if self.shard and self.replicas == 1:
            raise ValueError("shard needs replicas above 1: there is nothing to share the weights with")
        if self.replicas > 1 and 0.0 < self.gpus < 1.0:
            raise ValueError(f"gpus {self.gpus:g} cannot be shared by replicas: NCCL wants a whole GPU for each")
        return self
