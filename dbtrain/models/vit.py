"""Vision transformer classifiers: the denoising block, and the end-to-end network on the same layers.

A block sees an image x and a noisy code z = y + sigma * eps of its label (y a row of the frozen codebook) and predicts
the label's distribution. The code takes the place of the class token; the head reads the answer off that token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import make_codebook
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.diffusion.precondition import c_in, c_noise, weights
from dbtrain.model_config import ViTConfig
from dbtrain.models.family import Batch, Draw, Family, TrainableModule, register
from dbtrain.models.layers import FinalNorm, NoiseEmbedding, TransformerLayer, apply_layers, initialise, patchify
from dbtrain.plan import NoiseRange


class PatchStem(nn.Module):
    """Patches of (N, C, H, W) as tokens (N, T, width), with learned positions."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.project = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.positions = nn.Parameter(torch.empty(num_patches, config.width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, image_nchw: Tensor) -> Tensor:
        tokens: Tensor = self.project(patchify(image_nchw, self.patch_size))
        return tokens + self.positions


class ViTBlock(TrainableModule):
    """One denoising block, complete: private stem and noise embedding, its layers, private head."""

    codebook: Tensor

    def __init__(self, config: RunConfig, num_layers: int, trained: NoiseRange, codebook: Tensor):
        """`trained` is the range of noise levels the loss draws from; `codebook` (classes, width) is frozen."""
        super().__init__()
        model, self.noise = _model(config), config.noise
        self.trained = trained
        self.distribution = NoiseDistribution.from_config(config.noise)
        self.stem = PatchStem(model)
        self.code_stem = nn.Linear(model.width, model.width)
        self.noise_embedding = NoiseEmbedding(model.width)
        self.dropout = nn.Dropout(model.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(model.width, model.heads, model.mlp_width, model.dropout, conditioned=True)
            for _ in range(num_layers)
        )
        self.norm = FinalNorm(model.width, conditioned=True)
        self.head = nn.Linear(model.width, model.num_classes)
        self.register_buffer("codebook", codebook, persistent=False)
        initialise(self)
        # A small start, or unit noise drowns what attention brings to this token from the patches.
        nn.init.trunc_normal_(self.code_stem.weight, std=0.02)

    def forward(self, image_nchw: Tensor, z_nd: Tensor, sigma_n: Tensor) -> Tensor:
        """Logits (N, classes) of the label, given the image and its label's code at noise level sigma (N,)."""
        condition = self.noise_embedding(c_noise(sigma_n))
        code = self.code_stem(c_in(sigma_n, self.noise.sigma_data)[:, None] * z_nd)
        tokens = self.dropout(torch.cat([code[:, None], self.stem(image_nchw)], dim=1))
        tokens = apply_layers(self.layers, tokens, condition, recompute=self.recompute)
        logits: Tensor = self.head(self.norm(tokens[:, 0], condition))
        return logits

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """sigma (N,) from the training range and eps (N, width) from N(0, I)."""
        sigma = self.distribution.sample(self.trained, batch_size, generator)
        shape = (batch_size, self.codebook.shape[1])
        return {"sigma": sigma, "eps": torch.randn(shape, generator=generator, device=generator.device)}

    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Weighted cross-entropy of the label; the weight is each sample's own (method of Karras et al. 2022)."""
        sigma = draw["sigma"]
        z = self.codebook[batch["label"]] + sigma[:, None] * draw["eps"]
        logits = self(batch["image"], z, sigma)
        loss = F.cross_entropy(logits.float(), batch["label"], reduction="none")
        return (weights(self.noise.weight, sigma, self.noise.sigma_data) * loss).mean()


class ViTEndToEnd(TrainableModule):
    """The ordinary ViT: class token, all layers, one head, plain cross-entropy."""

    def __init__(self, config: RunConfig):
        super().__init__()
        model = _model(config)
        self.stem = PatchStem(model)
        self.class_token = nn.Parameter(torch.empty(model.width))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        self.dropout = nn.Dropout(model.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(model.width, model.heads, model.mlp_width, model.dropout, conditioned=False)
            for _ in range(model.depth)
        )
        self.norm = FinalNorm(model.width, conditioned=False)
        self.head = nn.Linear(model.width, model.num_classes)
        initialise(self)

    def forward(self, image_nchw: Tensor) -> Tensor:
        """Logits (N, classes)."""
        patches = self.stem(image_nchw)
        token = self.class_token.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = self.dropout(torch.cat([token, patches], dim=1))
        tokens = apply_layers(self.layers, tokens, recompute=self.recompute)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """Nothing: no noise enters."""
        return {}

    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Cross-entropy of the label."""
        return F.cross_entropy(self(batch["image"]).float(), batch["label"])


class ViTFamily(Family):
    """Vision transformers for classification."""

    name = "vit"
    task = "classify"

    def codebook(self, config: RunConfig) -> Tensor:
        """One row a class."""
        model = _model(config)
        return make_codebook(model.num_classes, model.width, config.codebook.scale, config.seed)

    def build_block(
        self, config: RunConfig, layers: tuple[int, int], trained: NoiseRange, codebook: Tensor | None
    ) -> ViTBlock:
        """A block of `layers[1] - layers[0]` layers."""
        assert codebook is not None
        return ViTBlock(config, layers[1] - layers[0], trained, codebook)

    def build_end_to_end(self, config: RunConfig) -> ViTEndToEnd:
        """The baseline."""
        return ViTEndToEnd(config)

    def example_batch(self, config: RunConfig, batch_size: int) -> Batch:
        """Zero images of class 0."""
        model = _model(config)
        shape = (batch_size, model.channels, model.image_size, model.image_size)
        return {"image": torch.zeros(shape), "label": torch.zeros(batch_size, dtype=torch.int64)}


def _model(config: RunConfig) -> ViTConfig:
    assert isinstance(config.model, ViTConfig)
    return config.model


register(ViTFamily())
