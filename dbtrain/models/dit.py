"""Diffusion transformers for images and latents (Peebles, Xie 2023), trained as in EDM (Karras et al. 2022).

A block sees a noisy image z = x + sigma * eps and, where the model is conditional, a class label, and estimates x. It
is a whole denoiser for its range of sigma; the end-to-end baseline is the same module with all layers and all of the
range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.config import RunConfig
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.diffusion.precondition import c_in, c_noise, c_out, c_skip, weighted_errors
from dbtrain.model_config import DiTConfig
from dbtrain.models.family import Batch, Draw, Family, Scaling, TrainableModule, register
from dbtrain.models.layers import FinalNorm, NoiseEmbedding, TransformerLayer, apply_layers, initialise, patchify
from dbtrain.plan import DatasetFacts, NoiseRange


class DiTStem(nn.Module):
    """Patches of (N, C, H, W) as tokens (N, T, width), with fixed two-dimensional positions."""

    positions: Tensor

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.project = nn.Linear(config.channels * config.patch_size**2, config.width)
        positions = sincos_positions(config.image_size // config.patch_size, config.width)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, image_nchw: Tensor) -> Tensor:
        tokens: Tensor = self.project(patchify(image_nchw, self.patch_size))
        return tokens + self.positions


class DiTDenoiser(TrainableModule):
    """A denoiser of `num_layers` layers, complete: stem, noise and label embeddings, layers, head."""

    def __init__(self, config: RunConfig, num_layers: int, trained: NoiseRange):
        """`trained` is the range of noise levels the loss draws from."""
        super().__init__()
        model, self.noise = _model(config), config.noise
        self.trained = trained
        self.distribution = NoiseDistribution.from_config(config.noise)
        self.image_shape = (model.channels, model.image_size, model.image_size)
        self.patch_size = model.patch_size
        self.label_dropout = model.label_dropout
        self.num_classes = model.num_classes
        self.stem = DiTStem(model)
        self.noise_embedding = NoiseEmbedding(model.width)
        # The row after the last class stands for "no label".
        self.label_embedding = None if model.num_classes is None else nn.Embedding(model.num_classes + 1, model.width)
        self.layers = nn.ModuleList(
            TransformerLayer(model.width, model.heads, model.mlp_width, model.dropout, conditioned=True)
            for _ in range(num_layers)
        )
        self.norm = FinalNorm(model.width, conditioned=True)
        self.head = nn.Linear(model.width, model.channels * model.patch_size**2)
        initialise(self)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        # F = 0 at first: the denoiser starts as the best linear one, D = c_skip * z.
        nn.init.zeros_(self.head.weight)

    def forward(self, z_nchw: Tensor, sigma_n: Tensor, label_n: Tensor | None = None) -> Tensor:
        """The estimate D (N, C, H, W) of the clean images in `z_nchw`, in its type.

        `label_n` (N,) int64 are class ids, or num_classes for "no label", which also stands for None.
        """
        sigma_data = self.noise.sigma_data
        condition = self._condition(sigma_n, label_n)
        sigma = sigma_n.view(-1, 1, 1, 1)
        tokens = self.stem(c_in(sigma, sigma_data) * z_nchw)
        tokens = apply_layers(self.layers, tokens, condition, recompute=self.recompute)
        patches = self.head(self.norm(tokens, condition[:, None]))
        output = unpatchify(patches, self.image_shape, self.patch_size).to(z_nchw.dtype)
        return c_skip(sigma, sigma_data) * z_nchw + c_out(sigma, sigma_data) * output

    def errors(self, image_nchw: Tensor, sigma_n: Tensor, eps_nchw: Tensor, label_n: Tensor | None) -> Tensor:
        """Mean square errors (N,), each with the weight of its sample's sigma (Karras et al. 2022, equation 2)."""
        z = image_nchw + sigma_n.view(-1, 1, 1, 1) * eps_nchw
        estimate = self(z, sigma_n, label_n)
        return weighted_errors(self.noise.weight, estimate, image_nchw, sigma_n, self.noise.sigma_data)

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """sigma (N,) from the training range, eps (N, C, H, W) from N(0, I) and, with labels, which of them to hide."""
        device = generator.device
        sigma = self.distribution.sample(self.trained, batch_size, generator)
        eps = torch.randn((batch_size, *self.image_shape), generator=generator, device=device)
        if self.num_classes is None:
            return {"sigma": sigma, "eps": eps}
        hidden = torch.rand(batch_size, generator=generator, device=device) < self.label_dropout
        return {"sigma": sigma, "eps": eps, "hidden": hidden}

    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Mean of `errors` at the drawn noise, with the drawn labels hidden."""
        label = None if self.num_classes is None else batch["label"].masked_fill(draw["hidden"], self.num_classes)
        return self.errors(batch["image"], draw["sigma"], draw["eps"], label).mean()

    def _condition(self, sigma_n: Tensor, label_n: Tensor | None) -> Tensor:
        """(N, width)"""
        embedded: Tensor = self.noise_embedding(c_noise(sigma_n))
        if self.label_embedding is None:
            assert label_n is None, "an unconditional model is given labels"
            return embedded
        if label_n is None:
            assert self.num_classes is not None
            label_n = torch.full(sigma_n.shape, self.num_classes, dtype=torch.int64, device=sigma_n.device)
        # Through a nonlinearity, or the label could not mean different things at different noise.
        return F.silu(embedded + self.label_embedding(label_n))


class DiTFamily(Family):
    """Diffusion transformers for image generation."""

    name = "dit"
    task = "generate_images"

    def scaling(self, config: RunConfig, data: DatasetFacts) -> Scaling:
        """Pixels to [-1, 1]; latents to mean 0 and the standard deviation that preconditioning assumes."""
        if data.kind == "latent":
            return data.mean, tuple(std / config.noise.sigma_data for std in data.std)
        return (0.5,) * len(data.mean), (0.5,) * len(data.mean)

    def build_block(
        self, config: RunConfig, layers: tuple[int, int], trained: NoiseRange, codebook: Tensor | None
    ) -> DiTDenoiser:
        """A block of `layers[1] - layers[0]` layers."""
        return DiTDenoiser(config, layers[1] - layers[0], trained)

    def build_end_to_end(self, config: RunConfig) -> DiTDenoiser:
        """The baseline: all layers, all noise levels."""
        everywhere = NoiseRange(low=config.noise.sigma_min, high=config.noise.sigma_max)
        return DiTDenoiser(config, config.model.depth, everywhere)

    def example_batch(self, config: RunConfig, batch_size: int) -> Batch:
        """Zero images of class 0."""
        model = _model(config)
        shape = (batch_size, model.channels, model.image_size, model.image_size)
        return {"image": torch.zeros(shape), "label": torch.zeros(batch_size, dtype=torch.int64)}


def sincos_positions(side: int, width: int) -> Tensor:
    """Positions (side * side, width) of a square grid, row by row: sines and cosines of row and column.

    As in DiT: half of the features for either coordinate, wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017).
    A width that 4 does not divide gets fewer cosines of the columns.
    """
    quarter = -(-width // 4)
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, -1)[:, :width].contiguous()


def unpatchify(patches_ntp: Tensor, image_shape: tuple[int, int, int], patch_size: int) -> Tensor:
    """The images (N, C, H, W) that `patchify` cuts into these patches."""
    c, h, w = image_shape
    grid = patches_ntp.view(-1, h // patch_size, w // patch_size, c, patch_size, patch_size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, h, w)


def _model(config: RunConfig) -> DiTConfig:
    assert isinstance(config.model, DiTConfig)
    return config.model


register(DiTFamily())
