"""Classifying with an assembled model: the chain of blocks, or one forward pass of a baseline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import READOUTS
from dbtrain.data.batches import make_transform
from dbtrain.diffusion.chain import ChainTrace, read_out, run_chain
from dbtrain.errors import UserError
from dbtrain.inference.images import ImageLike, as_list, to_tensor
from dbtrain.model_config import ImageModelConfig
from dbtrain.models import family_of
from dbtrain.models.family import FEATURES, Batch, relays
from dbtrain.randomness import derive_key, keyed_uniform

PREDICT_BATCH = 256
"""Images that `predict` sends through the network at a time."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one image."""

    label: str
    """Name of the likeliest class."""
    class_id: int
    probability: float
    """Its probability under the read-out."""
    probabilities: tuple[float, ...]
    """Of all classes, by class id."""


class Classifier:
    """An assembled image classifier. `predict` is the front door; `traces` and `logits` are what evaluation uses."""

    def __init__(self, model: AssembledModel):
        assert model.plan.data is not None
        self.model = model
        self.config = model.config
        self.class_names = model.plan.data.class_names
        assert isinstance(model.config.model, ImageModelConfig)
        self._network = model.config.model
        scaling = family_of(model.config).scaling(model.config, model.plan.data)
        self._transform = make_transform(model.config, model.plan.data, scaling, None)

    def predict(self, images: Sequence[ImageLike] | ImageLike, *, readout: str | None = None) -> list[Prediction]:
        """Classify one image or several: files, PIL images, uint8 arrays (H, W) or (H, W, C), uint8 tensors (C, H, W).

        Images of another size are resized and cut to a square; grey and colour are converted to what the model was
        trained on. The answer for an image does not depend on the others, nor on chance: starting noises come from
        the run's seed.

        Raises:
            UserError: a file is missing or is no image, or `readout` is not a read-out of this model.
        """
        self._check_readout(readout)
        network, answers, todo = self._network, [], as_list(images)
        for first in range(0, len(todo), PREDICT_BATCH):
            pixels = [
                to_tensor(image, network.image_size, network.channels) for image in todo[first : first + PREDICT_BATCH]
            ]
            batch = self.normalise(torch.stack(pixels).to(self.model.device))
            probabilities = self.probabilities(batch, np.zeros(len(batch), np.int64), readout)
            answers += [self._prediction(row) for row in probabilities.cpu()]
        return answers

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32, as the network was trained with."""
        return self._transform({"image": images}, np.zeros(len(images), np.int64))["image"]

    def probabilities(self, images: Tensor, positions: npt.NDArray[np.int64], readout: str | None = None) -> Tensor:
        """Probabilities (N, classes) for normalised images (N, C, H, W); `positions` key the starting noises.

        Raises:
            UserError: `readout` is not a read-out of this model.
        """
        self._check_readout(readout)
        if self.model.end_to_end:
            return self.logits(images).softmax(dim=-1)
        name = readout or self.config.chain.readout
        noises = self.config.chain.start_noises if name.endswith("_mean") else 1
        steps = 1 if name.startswith("first") else None
        features = self.features(images, steps)
        traces = [self.walk(features, positions, noise, stop_after=steps) for noise in range(noises)]
        return read_out(traces, name)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """One forward pass of an end-to-end network: (N, classes)."""
        logits: Tensor = self.model.modules[0](images)
        return logits.float()

    @torch.inference_mode()
    def trace(
        self,
        images: Tensor,
        positions: npt.NDArray[np.int64],
        noise: int,
        *,
        stop_after: int | None = None,
        skip: Collection[int] = (),
    ) -> ChainTrace:
        """Walk the chain once, from starting noise number `noise`; only its first `stop_after` steps when given, and
        without the blocks in `skip`."""
        features = self.features(images, None if skip else stop_after, skip)
        return self.walk(features, positions, noise, stop_after=stop_after, skip=skip)

    @torch.inference_mode()
    def features(self, images: Tensor, blocks: int | None = None, skip: Collection[int] = ()) -> dict[int, Tensor]:
        """What each block, or each of the first `blocks`, makes of the images; chains from any noise go on from it."""
        found: dict[int, Tensor] = {}
        before: Batch = {}
        for index, module in enumerate(self.model.modules[:blocks]):
            if index not in skip:
                found[index] = module.features({"image": images, **before})
                before = {FEATURES: found[index]}
        return found

    @torch.inference_mode()
    def walk(
        self,
        features: Mapping[int, Tensor],
        positions: npt.NDArray[np.int64],
        noise: int,
        *,
        stop_after: int | None = None,
        skip: Collection[int] = (),
    ) -> ChainTrace:
        """`trace`, once the images' `features` are there."""
        config, codebook = self.config, self.model.codebook
        assert codebook is not None
        relayed = relays(config, self.model.plan.kind)
        answers: dict[int, Tensor] = {}  # by block, its last one

        def denoise(index: int, z: Tensor, sigma: float) -> Tensor:
            before = [answers[block] for block in sorted(answers) if block < index]
            belief = before[-1] if relayed and before else None
            answers[index] = self.log_probs(features[index], index, z, sigma, belief)
            return answers[index]

        return run_chain(
            denoise,
            self.model.ranges,
            codebook,
            config.noise,
            config.chain.steps or len(self.model.modules),
            config.chain.bridge,
            config.noise.sigma_max * self.start(positions, noise),
            stop_after=stop_after,
            skip=skip,
            fresh=lambda step: self.fresh(positions, noise, step),
        )

    @torch.inference_mode()
    def log_probs(self, features: Tensor, index: int, z: Tensor, sigma: float, belief: Tensor | None = None) -> Tensor:
        """What block `index` says of the labels at noise level sigma, given its `features`: (N, classes). Where blocks
        relay it completes a `belief`, what the block before has said."""
        sigmas = torch.full((len(features),), sigma, device=features.device)
        logits: Tensor = cast(Any, self.model.modules[index]).denoise(features, z.float(), sigmas)
        return (logits.float() if belief is None else logits.float() + belief).log_softmax(dim=-1)

    def start(self, positions: npt.NDArray[np.int64], noise: int) -> Tensor:
        """Standard normal noise (N, width), a function of (seed, noise number, position) alone."""
        assert self.model.codebook is not None
        key = derive_key(self.config.seed, "start", noise)
        uniform = torch.from_numpy(keyed_uniform(key, positions, self.model.codebook.shape[1]))
        normal: Tensor = torch.special.ndtri(uniform.clamp_(min=2.0**-54))
        return normal.float().to(self.model.device)

    def fresh(self, positions: npt.NDArray[np.int64], noise: int, step: int) -> Tensor:
        """Uniform numbers (N, 1 + width) for the bridge `sample`: of (seed, noise number, step, position) alone."""
        assert self.model.codebook is not None
        key = derive_key(self.config.seed, "bridge", noise, step)
        return torch.from_numpy(keyed_uniform(key, positions, 1 + self.model.codebook.shape[1])).to(self.model.device)

    def _check_readout(self, name: str | None) -> None:
        known = () if self.model.end_to_end else READOUTS
        if name is not None and name not in known:
            mend = f"use one of {', '.join(known)}" if known else "leave it out: an end-to-end network says one thing"
            raise UserError("is not a read-out of this model", field="--readout", value=name, mend=mend)

    def _prediction(self, row: Tensor) -> Prediction:
        class_id = int(row.argmax())
        return Prediction(self.class_names[class_id], class_id, float(row[class_id]), tuple(float(p) for p in row))
