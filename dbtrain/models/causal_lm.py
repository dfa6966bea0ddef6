"""Llama-style language models: the denoising block, and the end-to-end network on the same layers.

A block sees the clean tokens before position i and a noisy code z = y + sigma * eps of token x_i (y a row of the frozen
codebook) and predicts x_i. Its layers read the clean tokens alone, and the code joins what they made of them in front
of the head: given x_i, its code says nothing more of the text, so p(x_i | text, z, sigma) is p(x_i | text) times what z
says, and layers need not know z (docs/lab-notes.md, 2026-11-29). With `model.noisy_layers` the code goes through the
last layers, too, as in Shing, Koyama, Akiba 2026; `dbtrain.models.llama` says how two streams go through one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import make_codebook
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.diffusion.precondition import c_in, c_noise, weights
from dbtrain.model_config import CausalLMConfig, LlamaConfig
from dbtrain.models.family import Batch, Draw, Family, TrainableModule, register
from dbtrain.models.layers import NoiseEmbedding, apply_layers, initialise, layers_of, modulate
from dbtrain.models.llama import (
    Appended,
    ContextCache,
    KVCache,
    LlamaLayer,
    RMSNorm,
    Rotary,
    Streams,
    noisy_mask,
    read_layers,
)
from dbtrain.models.pretrained import Checkpoint, codebook_of_checkpoint, start_from_checkpoint
from dbtrain.models.token_loss import chunked_cross_entropy, needs_chunks
from dbtrain.plan import NoiseRange

CONDITION = 64
"""Size of the noise condition. It stands for one number, and each noisy token has its own: a wide one costs much."""


class TokenModel(TrainableModule):
    """What blocks and the end-to-end network have in common: embedding, rotary positions, final norm and head."""

    def __init__(self, model: LlamaConfig):
        super().__init__()
        self.model = model
        self.embed_tokens = nn.Embedding(model.vocab_size, model.width)
        self.rotary = Rotary(model)
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.lm_head = None if model.tie_head else nn.Linear(model.width, model.vocab_size, bias=False)

    def head(self, x_ntd: Tensor) -> Tensor:
        """Logits (..., V) of normed tokens."""
        matrix = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x_ntd, matrix)

    def shifted(self, tokens_nl: Tensor) -> Tensor:
        """The input that predicts a row: the begin token, then the row without its last token."""
        begin = torch.full_like(tokens_nl[:, :1], self.model.begin)
        return torch.cat([begin, tokens_nl[:, :-1]], dim=1)


class CausalLMBlock(TokenModel):
    """One denoising block, complete: private embedding, code stem and noise embedding, its layers, private head."""

    codebook: Tensor

    def __init__(
        self,
        config: RunConfig,
        num_layers: int,
        trained: NoiseRange,
        codebook: Tensor,
        clean_loss: float = 0.0,
        noisy_layers: int | None = None,
    ):
        """`trained` is the range of noise levels the loss draws from; `codebook` (vocabulary, width) is frozen; the
        noisy tokens go through the last `noisy_layers` layers, or all of them."""
        model = config.model
        assert isinstance(model, LlamaConfig)
        super().__init__(model)
        self.noise, self.clean_loss = config.noise, clean_loss
        self.trained = trained
        self.distribution = NoiseDistribution.from_config(config.noise)
        self.code_stem = nn.Linear(codebook.shape[1], model.width)
        self.noise_embedding = NoiseEmbedding(CONDITION)
        clean_layers = 0 if noisy_layers is None else max(0, num_layers - noisy_layers)
        self.layers = nn.ModuleList(
            LlamaLayer(model, condition=None if index < clean_layers else CONDITION) for index in range(num_layers)
        )
        self.norm_modulation = nn.Linear(CONDITION, 2 * model.width)
        self.register_buffer("codebook", codebook, persistent=False)
        initialise_tokens(self)
        # Noise on the way in would drown the token before, and with it most of what the block can know at first.
        nn.init.zeros_(self.code_stem.weight)

    def forward(
        self, tokens_nl: Tensor, z_nld: Tensor, sigma_nl: Tensor, *, clean: bool = False, logits: bool = True
    ) -> Tensor:
        """Logits (N, L, V) of each token x_i, given those before it and its noisy code.

        Args:
            tokens_nl: the rows; x_i itself has no influence on what is said of it.
            z_nld: noisy codes.
            sigma_nl: their noise levels, (N, L), or (N, 1) for one a row.
            clean: append what the clean stream says of the same tokens: (N, 2 L, V).
            logits: give these; or what the head makes them of, (N, L or 2 L, width).
        """
        return self.answer(self.context(tokens_nl), z_nld, sigma_nl, clean=clean, logits=logits)

    def context(self, tokens_nl: Tensor) -> Streams:
        """What there is of rows before any noise: the clean tokens as they enter the layers with two streams, and what
        noisy tokens start from. Evaluation asks about the same rows with many noises."""
        inputs = self.shifted(tokens_nl)
        return self._enter(self.embed_tokens(inputs), self.rotary(slice(0, inputs.shape[1])))

    def answer(
        self, context: Streams, z_nld: Tensor, sigma_nl: Tensor, *, clean: bool = False, logits: bool = True
    ) -> Tensor:
        """The rest of `forward`."""
        (x_clean, before), condition = context, self._condition(sigma_nl)
        x_noisy = self._noisy_tokens(before, z_nld, sigma_nl)
        if streams := [layer.two_streams for layer in self._noisy_layers()]:
            length = x_clean.shape[1]
            x, rest = (x_clean, x_noisy), (condition, self.rotary(slice(0, length + 1)), noisy_mask(length, x_clean))
            x = apply_layers(streams[:-1], x, *rest, recompute=self.recompute)
            x_clean, x_noisy = apply_layers(streams[-1:], x, *rest, clean, recompute=self.recompute)
        normed = self._norm_noisy(x_noisy, condition)
        if clean:
            normed = torch.cat([normed, self.norm(x_clean)], dim=1)
        return self.head(normed) if logits else normed

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """sigma (N, L), each token's own, from the training range, and eps (N, L, code width) from N(0, I)."""
        shape = (batch_size, self.model.length)
        sigma = self.distribution.sample(self.trained, shape[0] * shape[1], generator).view(shape)
        eps = torch.randn((*shape, self.codebook.shape[1]), generator=generator, device=generator.device)
        return {"sigma": sigma, "eps": eps}

    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Mean over tokens of the weighted cross-entropy, each at its own noise level; with `model.clean_loss`, plus
        that many times the ordinary cross-entropy of the clean stream."""
        tokens, sigma = batch["tokens"], draw["sigma"]
        z = self.codebook[tokens] + sigma[..., None] * draw["eps"]
        with_clean = self.clean_loss > 0
        targets, factors = tokens, weights(self.noise.weight, sigma, self.noise.sigma_data)
        if with_clean:
            factors = torch.cat([factors, torch.full_like(sigma, self.clean_loss)], dim=1)
            targets = torch.cat([tokens, tokens], dim=1)
        if needs_chunks(targets, self.model.vocab_size):
            normed = self(tokens, z, sigma, clean=with_clean, logits=False)
            losses = chunked_cross_entropy(self.head, normed, targets, self.model.vocab_size).flatten()
        else:
            logits = self(tokens, z, sigma, clean=with_clean)
            losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (factors.flatten() * losses).sum() / sigma.numel()

    def start_cache(self, batch_size: int) -> ContextCache:
        """A cache for rows of up to `length` tokens, which has read the begin token."""
        cache = ContextCache(self.model, len(layers_of(self)), batch_size, self.embed_tokens.weight)
        begin = torch.full((batch_size, 1), self.model.begin, device=self.embed_tokens.weight.device)
        self.read(cache, begin)
        return cache

    def read(self, cache: ContextCache, tokens_nt: Tensor, counts_n: Tensor | None = None) -> None:
        """Append clean tokens to the cache: of row n the first counts_n[n], or all where that is not given.

        They wait there for the next `denoise`, which takes them through the weights; where there are two streams,
        together with the noisy tokens.
        """
        if cache.unread is not None:
            waiting, where = cache.unread
            x, rotation = self._reading(cache, waiting, where), self.rotary(where.positions)
            read_layers(self._noisy_layers(), x, rotation, cache, self._first(cache), where)
            cache.advance(where)
            cache.unread = None  # also if there is no place for those that come now
        cache.unread = tokens_nt, cache.place(tokens_nt, counts_n)

    def denoise(self, cache: ContextCache, z_nd: Tensor, sigma_n: Tensor) -> Tensor:
        """Logits (N, V) of each row's next token, given its noisy code at noise level sigma (N,)."""
        read: tuple[Tensor, Appended] | None = None
        if cache.unread is not None:
            where = cache.unread[1]
            read = self._reading(cache, *cache.unread), where
            cache.advance(where)
            cache.unread = None
        condition = self._condition(sigma_n[:, None])
        x = self._noisy_tokens(cache.context[:, None], z_nd[:, None], sigma_n[:, None])
        if self._noisy_layers():
            x = self._over_cache(cache, x, condition, read)
        return self.head(self._norm_noisy(x, condition))[:, 0]

    def _over_cache(
        self, cache: KVCache, x_n1d: Tensor, condition: Tensor, read: tuple[Tensor, Appended] | None
    ) -> Tensor:
        """The noisy tokens (N, 1, width) behind the layers with two streams, and together with them the clean ones that
        these layers still have to read, (N, T, width), if there are any."""
        rotation, mask, first = self.rotary(cache.lengths[:, None]), cache.noisy_mask(), self._first(cache)
        if read is None:
            for index, layer in enumerate(self._noisy_layers(), start=first):
                x_n1d = layer.denoise(x_n1d, condition, rotation, cache, index, mask)
            return x_n1d
        clean, where = read
        x = torch.cat([clean, x_n1d], dim=1)
        rotation = torch.cat([self.rotary(where.positions), rotation], dim=2)
        mask = torch.cat([F.pad(where.mask, (0, 1)), mask], dim=2)
        for index, layer in enumerate(self._noisy_layers(), start=first):
            x = layer.read_and_denoise(x, condition, rotation, cache, index, where, mask)
        return x[:, -1:]

    def _first(self, cache: KVCache) -> int:
        """What number the cache has for the first of the layers with two streams."""
        return len(cache.keys) - len(self._noisy_layers())

    def _reading(self, cache: ContextCache, tokens_nt: Tensor, where: Appended) -> Tensor:
        """Tokens to be read as they enter the layers with two streams, (N, T, width)."""
        embedded, rotation = self.embed_tokens(tokens_nt), self.rotary(where.positions)
        x = read_layers(self._clean_layers(), embedded, rotation, cache, 0, where)
        cache.remember(x, where)
        return x

    def _enter(self, embedded_nld: Tensor, rotation: Tensor) -> Streams:
        """The clean tokens as they enter the layers with two streams, and what noisy tokens start from: the same."""
        x = apply_layers(self._clean_layers(), embedded_nld, rotation, recompute=self.recompute)
        return x, x

    def _noisy_tokens(self, previous_nld: Tensor, z_nld: Tensor, sigma_nl: Tensor) -> Tensor:
        """A noisy token starts as what was made of the token before it, which every target may know, plus its code."""
        code: Tensor = self.code_stem(c_in(sigma_nl, self.noise.sigma_data)[..., None] * z_nld)
        return previous_nld + code

    def _condition(self, sigma_nl: Tensor) -> Tensor:
        embedded: Tensor = self.noise_embedding(c_noise(sigma_nl).flatten())
        return embedded.view(*sigma_nl.shape, -1)

    def _norm_noisy(self, x_nld: Tensor, condition_nlc: Tensor) -> Tensor:
        shift, scale = self.norm_modulation(condition_nlc).chunk(2, dim=-1)
        return modulate(self.norm(x_nld), shift, scale)

    def _clean_layers(self) -> list[LlamaLayer]:
        return [layer for layer in self.layers if isinstance(layer, LlamaLayer) and layer.modulation is None]

    def _noisy_layers(self) -> list[LlamaLayer]:
        return [layer for layer in self.layers if isinstance(layer, LlamaLayer) and layer.modulation is not None]


class CausalLM(TokenModel):
    """The ordinary language model: all layers, one head, next-token cross-entropy."""

    def __init__(self, config: RunConfig):
        super().__init__(_model(config))
        self.layers = nn.ModuleList(LlamaLayer(self.model, condition=None) for _ in range(self.model.depth))
        initialise_tokens(self)

    def forward(self, tokens_nl: Tensor, *, logits: bool = True) -> Tensor:
        """Logits (N, L, V) of each token x_i, given those before it; or what the head makes them of, (N, L, width)."""
        x = self.embed_tokens(self.shifted(tokens_nl))
        x = apply_layers(self.layers, x, self.rotary(slice(0, x.shape[1])), recompute=self.recompute)
        normed = self.norm(x)
        return self.head(normed) if logits else normed

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """Nothing: no noise enters."""
        return {}

    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Cross-entropy of every token."""
        tokens, size = batch["tokens"], self.model.vocab_size
        if needs_chunks(tokens, size):
            return chunked_cross_entropy(self.head, self(tokens, logits=False), tokens, size).mean()
        return F.cross_entropy(self(tokens).float().flatten(0, 1), tokens.flatten())

    def start_cache(self, batch_size: int) -> KVCache:
        """A cache for rows of up to `length` tokens, which has read the begin token."""
        cache = KVCache(self.model, len(self.layers), batch_size, self.embed_tokens.weight)
        self.read(cache, torch.full((batch_size, 1), self.model.begin, device=self.embed_tokens.weight.device))
        return cache

    def read(self, cache: KVCache, tokens_nt: Tensor, counts_n: Tensor | None = None) -> Tensor:
        """Append tokens: of row n the first counts_n[n], or all. Returns logits (N, V) of what comes after the last
        token read; a row that is given none has no answer, and what stands there means nothing."""
        where = cache.place(tokens_nt, counts_n)
        x, rotation = self.embed_tokens(tokens_nt), self.rotary(where.positions)
        x = read_layers(self.layers, x, rotation, cache, 0, where)
        cache.advance(where)
        rows = torch.arange(len(tokens_nt), device=x.device)
        return self.head(self.norm(x[rows, (where.counts - 1).clamp_min(0)]))


class CausalLMFamily(Family):
    """Language models that predict the next token."""

    name = "causal_lm"
    task = "generate_text"

    def check_start(self, config: RunConfig) -> None:
        """Whether a pretrained checkpoint is there and fits."""
        if _model(config).pretrained is not None:
            Checkpoint(_model(config)).verify()

    def codebook(self, config: RunConfig) -> Tensor:
        """One row a token id: of random directions, or of those in a pretrained embedding."""
        model = _model(config)
        if model.pretrained is not None:
            return codebook_of_checkpoint(model, config.codebook.scale)
        return make_codebook(model.vocab_size, model.width, config.codebook.scale, config.seed)

    def build_block(
        self, config: RunConfig, layers: tuple[int, int], trained: NoiseRange, codebook: Tensor | None
    ) -> CausalLMBlock:
        """A block of `layers[1] - layers[0]` layers."""
        assert codebook is not None
        model = _model(config)
        return CausalLMBlock(config, layers[1] - layers[0], trained, codebook, model.clean_loss, model.noisy_layers)

    def build_end_to_end(self, config: RunConfig) -> CausalLM:
        """The baseline."""
        return CausalLM(config)

    def start_from(self, config: RunConfig, layers: tuple[int, int], module: TrainableModule) -> None:
        """Take what a pretrained checkpoint has: embedding, the module's own layers, final norm and head."""
        if _model(config).pretrained is not None:
            start_from_checkpoint(_model(config), layers, module)

    def example_batch(self, config: RunConfig, batch_size: int) -> Batch:
        """Rows of token 0."""
        return {"tokens": torch.zeros((batch_size, _model(config).length), dtype=torch.int64)}


def initialise_tokens(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 and zero biases; zero for AdaLN projections."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Embedding | nn.Linear):
            nn.init.normal_(child.weight, std=0.02)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
        if name.endswith("modulation"):
            nn.init.zeros_(child.weight)
    for child in module.modules():
        if isinstance(child, NoiseEmbedding):
            initialise(child)


def _model(config: RunConfig) -> CausalLMConfig:
    assert isinstance(config.model, CausalLMConfig)
    return config.model


register(CausalLMFamily())
