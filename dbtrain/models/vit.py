"""Vision transformer classifiers: the denoising block, and the end-to-end network on the same layers.

A block sees an image x and a noisy code z = y + sigma * eps of its label (y a row of the frozen codebook) and predicts
the label's distribution. Its layers work on the image alone; a reader that knows z and sigma makes the answer of it.
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
from dbtrain.models.family import (
    BELIEF,
    CODE,
    FEATURES,
    Batch,
    Draw,
    Family,
    TrainableModule,
    register,
    relayed,
    relays,
)
from dbtrain.models.layers import (
    FinalNorm,
    NoiseEmbedding,
    TransformerLayer,
    apply_layers,
    initialise,
    modulate,
    patchify,
)
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


class CodeReader(nn.Module):
    """One token, the noisy code of the label, reads what the layers have made of the image's tokens.

    All that depends on the noise is in here: given the label, its noisy code says nothing more of the image, so
    p(y | x, z, sigma) is p(y | x) times what z says, and the layers need not know z (docs/lab-notes.md, 2026-11-29).
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width))
        self.code_stem = nn.Linear(width, width)
        self.noise_embedding = NoiseEmbedding(width)
        self.norm_image = nn.LayerNorm(width)
        self.norm_code = nn.LayerNorm(width, elementwise_affine=False)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = FinalNorm(width, conditioned=True)

    def initialise(self) -> None:
        """First weights that are not those of every matrix."""
        nn.init.trunc_normal_(self.query, std=0.02)
        # A small start, or unit noise drowns what attention brings to this token from the image.
        nn.init.trunc_normal_(self.code_stem.weight, std=0.02)

    def forward(self, image_ntd: Tensor, z_nd: Tensor, c_noise_n: Tensor) -> Tensor:
        """(N, width), normed for the head; `z_nd` is scaled by c_in."""
        condition = self.noise_embedding(c_noise_n)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        token = self.query + self.code_stem(z_nd)
        hidden = self._attend(modulate(self.norm_code(token), shift_a, scale_a), self.norm_image(image_ntd))
        token = token + (1 + gate_a) * self.dropout(hidden)
        hidden = self.mlp(modulate(self.norm_mlp(token), shift_m, scale_m))
        token = token + (1 + gate_m) * self.dropout(hidden)
        normed: Tensor = self.norm(token, condition)
        return normed

    def _attend(self, token_nd: Tensor, image_ntd: Tensor) -> Tensor:
        n, t, width = image_ntd.shape
        q_nh1k = self.q(token_nd).view(n, self.heads, 1, -1)
        k_nhtk, v_nhtk = self.kv(image_ntd).view(n, t, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q_nh1k, k_nhtk, v_nhtk)
        out: Tensor = self.out(mixed.reshape(n, width))
        return out


class ViTBlock(TrainableModule):
    """One denoising block, complete: private stem, its layers over the image's tokens, private reader and head."""

    codebook: Tensor

    def __init__(
        self,
        config: RunConfig,
        num_layers: int,
        own: NoiseRange,
        trained: NoiseRange,
        codebook: Tensor,
        relayed: bool = False,
    ):
        """The block answers for the noise levels in `own`, and its loss draws from those in `trained`; `codebook`
        (classes, width) is frozen. A `relayed` block goes on from what the block before it says, in training as in the
        chain, at the top of its own range."""
        super().__init__()
        self.own = own
        model, self.noise = _model(config), config.noise
        self.trained = trained
        self.distribution = NoiseDistribution.from_config(config.noise)
        self.stem = PatchStem(model)
        self.relay_norm = nn.LayerNorm(model.width) if relayed else None
        self.dropout = nn.Dropout(model.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(model.width, model.heads, model.mlp_width, model.dropout, conditioned=False)
            for _ in range(num_layers)
        )
        self.reader = CodeReader(model.width, model.heads, model.mlp_width, model.dropout)
        self.head = nn.Linear(model.width, model.num_classes)
        self.register_buffer("codebook", codebook, persistent=False)
        initialise(self)
        self.reader.initialise()

    def features(self, batch: Batch) -> Tensor:
        """What the layers make of the image, (N, T, width); a relayed block adds what the one before has made of it,
        if there is one."""
        return self._features(batch["image"], batch.get(FEATURES))

    def _features(self, image_nchw: Tensor, before_ntd: Tensor | None) -> Tensor:
        tokens = self.stem(image_nchw)
        if self.relay_norm is not None and before_ntd is not None:
            tokens = tokens + self.relay_norm(before_ntd)
        features: Tensor = apply_layers(self.layers, self.dropout(tokens), recompute=self.recompute)
        return features

    def denoise(self, features_ntd: Tensor, z_nd: Tensor, sigma_n: Tensor) -> Tensor:
        """Logits (N, classes), given the image's features and the label's code at noise level sigma (N,)."""
        scaled = c_in(sigma_n, self.noise.sigma_data)[:, None] * z_nd
        logits: Tensor = self.head(self.reader(features_ntd, scaled, c_noise(sigma_n)))
        return logits

    def forward(self, image_nchw: Tensor, z_nd: Tensor, sigma_n: Tensor, before_ntd: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of the label, given the image and its label's code at noise level sigma (N,); `before`
        are the features of the block before, where there is one to go on from."""
        return self.denoise(self._features(image_nchw, before_ntd), z_nd, sigma_n)

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """sigma (N,) from the training range and eps (N, width) from N(0, I)."""
        sigma = self.distribution.sample(self.trained, batch_size, generator)
        shape = (batch_size, self.codebook.shape[1])
        return {"sigma": sigma, "eps": torch.randn(shape, generator=generator, device=generator.device)}

    def hand_on(self, batch: Batch, draw: Draw) -> Batch:
        """The block's step of the chain, at the top of its own range, with the softmax bridge."""
        features = self.features(batch)
        z, sigma = self._chain_state(batch, draw)
        answer = self._complete(self.denoise(features, z, sigma), batch).log_softmax(dim=-1)
        a = self.own.low / self.own.high
        return {FEATURES: features, BELIEF: answer, CODE: a * z + (1.0 - a) * (answer.exp() @ self.codebook)}

    def _chain_state(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """z and sigma where the chain comes to this block: the code handed on, or pure noise."""
        eps = draw["eps"]
        sigma = torch.full((len(eps),), self.own.high, device=eps.device)
        return batch.get(CODE, self.own.high * eps), sigma

    def _complete(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits of a relayed block are what it adds to the belief of the one before."""
        return logits.float() + batch[BELIEF] if BELIEF in batch else logits.float()

    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Weighted cross-entropy of the label; the weight is each sample's own (method of Karras et al. 2022).

        The noisy code is made from the label; that of a relayed block comes down the chain, which knows no label."""
        if BELIEF in batch:
            z, sigma = self._chain_state(batch, draw)
        else:
            sigma = draw["sigma"]
            z = self.codebook[batch["label"]] + sigma[:, None] * draw["eps"]
        logits = self._complete(self(batch["image"], z, sigma, batch.get(FEATURES)), batch)
        loss = F.cross_entropy(logits, batch["label"], reduction="none")
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
        own = trained
        if relays(config, "blocks"):  # only then it is asked for
            (own,) = [piece.noise for piece in self.cut(config) if piece.layers == layers and piece.noise is not None]
        return ViTBlock(config, layers[1] - layers[0], own, trained, codebook, relayed(config, layers))

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
