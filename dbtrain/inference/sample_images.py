"""Sampling images, or latents, with an assembled diffusion model: by the chain of blocks, or the baseline's one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.diffusion.partition import owner
from dbtrain.diffusion.sampler import Solver, rho_grid, sample
from dbtrain.errors import UserError
from dbtrain.inference.evaluation import Progress
from dbtrain.model_config import ImageModelConfig
from dbtrain.models import family_of
from dbtrain.randomness import derive_key, keyed_uniform

SAMPLE_BATCH = 250
"""Images that go through the network at a time where the caller names no number."""
_SOLVERS = ("euler", "heun")

Samples = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""Images uint8 (N, H, W, C), or latents float32 (N, C, H, W)."""


class ImageSampler:
    """An assembled image generator. `sample` is the front door; `generate` is what evaluation uses."""

    def __init__(self, model: AssembledModel):
        assert model.plan.data is not None
        assert isinstance(model.config.model, ImageModelConfig)
        self.model = model
        self.config = model.config
        # A family of somebody else's may know neither labels nor how to leave them out.
        self.num_classes: int | None = getattr(model.config.model, "num_classes", None)
        self._label_dropout: float = getattr(model.config.model, "label_dropout", 0.0)
        self.class_names = model.plan.data.class_names
        self.latents = model.plan.data.kind == "latent"
        self._network = model.config.model
        self._scaling = family_of(model.config).scaling(model.config, model.plan.data)

    def sample(
        self,
        count: int,
        labels: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = SAMPLE_BATCH,
        progress: Progress | None = None,
    ) -> Samples:
        """Draw `count` samples. Sample i is a function of (model, its label, seed, i): neither `count`, nor
        `batch_size`, nor the other samples change it by more than rounding.

        Args:
            labels: class ids, gone through again and again until `count` samples have one; all classes in turn when
                not given.
            steps: denoising steps; `chain.steps` of the run's configuration when not given, as are
            solver: "euler" or "heun", and
            guidance: strength of classifier-free guidance; 1 is none.
            progress: called with the number of finished samples, parts of samples counted together.

        Returns:
            images as uint8 (count, H, W, C); latents as float32 (count, C, H, W), in the units of the training data.

        Raises:
            UserError: one of the arguments cannot be, so many samples do not fit into memory, or guidance is asked of
                a model that did not learn it.
        """
        solver, steps, guidance = self._settings(solver, steps, guidance)
        for field, value in (("--count", count), ("--batch-size", batch_size)):
            if value < 1:
                raise UserError("has to be at least 1", field=field, value=value)
        if not 0 <= seed < 2**63:
            raise UserError("has to be from 0 to 2**63 - 1", field="--seed", value=seed)
        samples = self._room_for(count)
        chosen = self.labels_for(count, labels)
        for first in range(0, count, batch_size):
            positions = np.arange(first, min(first + batch_size, count), dtype=np.int64)

            def on_step(done: int, size: int = len(positions), first: int = first) -> None:
                if progress is not None:
                    progress(first + size * done // steps, count)

            part = None if chosen is None else chosen[first : first + len(positions)]
            drawn = self.generate(positions, part, steps, solver, guidance, seed, on_step)
            if not drawn.isfinite().all():
                if guidance == 1.0:
                    raise UserError("the model's answers are not finite", mend="train it with a lower optimiser.lr")
                raise UserError("drives samples beyond all bounds", field="--guidance", value=guidance, mend="lower it")
            samples[first : first + len(positions)] = self._finish(drawn)
        return samples

    def labels_for(self, count: int, labels: Sequence[int] | None = None) -> Tensor | None:
        """The label of each of `count` samples, int64 (count,), on the CPU; None for an unconditional model.

        Raises:
            UserError: there is no such class, or the model knows no classes.
        """
        if self.num_classes is None:
            if labels is not None:
                raise _without_labels(labels)
            return None
        known = range(self.num_classes)
        chosen = list(known if labels is None else labels)
        if not chosen:
            raise UserError("names no class", field="--label", value=chosen)
        for label in chosen:
            if label not in known:
                raise UserError("is not a class", field="--label", value=label, mend=f"they are 0 to {known[-1]}")
        return torch.tensor(chosen, dtype=torch.int64)[torch.arange(count) % len(chosen)]

    def label_ids(self, names: Sequence[str]) -> list[int]:
        """The class ids that `labels` of `sample` takes, for class names.

        Raises:
            UserError: there is no such class, or the model knows no classes.
        """
        if self.num_classes is None:
            raise _without_labels(names)
        for name in names:
            if name not in self.class_names:
                mend = f"they are {', '.join(self.class_names[:20])}{', ...' * (len(self.class_names) > 20)}"
                raise UserError("is not a class", field="--label", value=name, mend=mend)
        return [self.class_names.index(name) for name in names]

    @torch.inference_mode()
    def generate(
        self,
        positions: npt.NDArray[np.int64],
        labels: Tensor | None,
        steps: int,
        solver: Solver,
        guidance: float,
        seed: int,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One batch as the network sees it: scaled float64 (N, C, H, W), on the model's device, not clipped.

        `positions` (N,) key the starting noises.
        """
        label = None if labels is None else labels.to(self.model.device)
        return sample(
            lambda z, sigma: self.denoise(z, sigma, label, guidance),
            self.config.noise.sigma_max * self.start(positions, seed),
            rho_grid(self.config.noise, steps),
            solver,
            on_step,
        )

    def denoise(self, z: Tensor, sigma: float, label: Tensor | None, guidance: float) -> Tensor:
        """The estimate D (N, C, H, W), float64, of the block that owns sigma (float in its range).

        Classifier-free guidance (Ho, Salimans 2022): D_none + guidance * (D_label - D_none).
        """
        model = self.model
        module = model.modules[0 if model.end_to_end else owner(model.ranges, sigma)]
        sigmas = torch.full((len(z),), sigma, device=z.device)
        told: Tensor = module(z.float(), sigmas, label).double()
        if label is None or guidance == 1.0:
            return told
        untold: Tensor = module(z.float(), sigmas, None).double()
        return untold + guidance * (told - untold)

    def start(self, positions: npt.NDArray[np.int64], seed: int) -> Tensor:
        """Standard normal noise (N, C, H, W), float64, a function of (seed, position) alone."""
        network = self._network
        shape = (network.channels, network.image_size, network.image_size)
        uniform = torch.from_numpy(keyed_uniform(derive_key(seed, "sample"), positions, math.prod(shape)))
        normal: Tensor = torch.special.ndtri(uniform.clamp_(min=2.0**-54))
        return normal.view(-1, *shape).to(self.model.device)

    def _settings(self, solver: str | None, steps: int | None, guidance: float | None) -> tuple[Solver, int, float]:
        """What is asked for, with the configured values where nothing is, checked."""
        chain = self.config.chain
        steps = self.steps if steps is None else steps
        guidance = chain.guidance if guidance is None else guidance
        if steps < 1:
            raise UserError("has to be at least 1", field="--steps", value=steps)
        if not 0.0 <= guidance < math.inf:
            raise UserError("has to be a number from 0 up", field="--guidance", value=guidance, mend="1 is none")
        if guidance != 1.0 and (self.num_classes is None or self._label_dropout == 0.0):
            raise UserError(
                "needs a model that knows images with and without a label",
                field="--guidance",
                value=guidance,
                mend="leave it out, or train with model.num_classes and model.label_dropout",
            )
        if solver is not None and solver not in _SOLVERS:
            raise UserError("is not a solver", field="--solver", value=solver, mend=f"use {' or '.join(_SOLVERS)}")
        return (chain.solver if solver is None else solver), steps, guidance  # type: ignore[return-value]

    @property
    def steps(self) -> int:
        """Denoising steps of a walk where the caller names no number."""
        return self.config.chain.steps or self.config.blocks.count

    def _room_for(self, count: int) -> Samples:
        """An array for `count` samples; hopeless numbers are refused before the first is drawn."""
        side, channels = self._network.image_size, self._network.channels
        shape = (channels, side, side) if self.latents else (side, side, channels)
        try:
            room: npt.NDArray[Any] = np.empty((count, *shape), np.float32 if self.latents else np.uint8)
        except (MemoryError, ValueError):  # the latter where there are more of them than addresses
            mend = "draw fewer, again and again with another --seed"
            raise UserError("does not fit into memory", field="--count", value=count, mend=mend) from None
        return room

    def _finish(self, scaled: Tensor) -> Samples:
        """From what the network sees to what the user's data looks like."""
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in self._scaling)
        raw = scaled.cpu() * std + mean
        if self.latents:
            latents: npt.NDArray[np.float32] = raw.float().numpy()
            return latents
        pixels: npt.NDArray[np.uint8] = (raw * 255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return pixels


def _without_labels(labels: Sequence[int] | Sequence[str]) -> UserError:
    mend = "leave labels out"
    return UserError("the model was trained without labels", field="--label", value=list(labels), mend=mend)
