"""Recurrent-depth language models (Geiping et al. 2025): a prelude, a core that is iterated, and a coda.

The prelude reads the tokens into a context e. The end-to-end network iterates a state, s <- norm(core(A [e ; s])) from
random s_0, and the coda turns the last state into logits; it is trained through a random number of iterations.

A denoising block has the same parts and is trained by one pass at a random noise level (Shing, Koyama, Akiba 2026): its
noisy token for x_i starts as A [e_i ; code of x_i with noise]. What an iteration hands to the next one is the estimate
of the code. Every block owns all layers; several blocks are specialists of one noise range each.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import make_codebook
from dbtrain.diffusion.partition import widen
from dbtrain.diffusion.precondition import c_in
from dbtrain.model_config import RecurrentLMConfig
from dbtrain.models.causal_lm import CausalLMBlock, TokenModel, initialise_tokens
from dbtrain.models.family import Batch, Draw, Family, Piece, register
from dbtrain.models.layers import apply_layers, layers_of
from dbtrain.models.llama import Appended, ContextCache, KVCache, LlamaLayer, RMSNorm, Streams, read_layers
from dbtrain.models.token_loss import chunked_cross_entropy, needs_chunks
from dbtrain.plan import NoiseRange
from dbtrain.randomness import derive_key, generator

STATE_STD = math.sqrt(2 / 5)
"""Standard deviation of each coordinate of s_0, which is cut off at three of them (Geiping et al. 2025)."""
SPREAD = 0.5
"""Standard deviation of the logarithm of the Poisson rate that numbers of iterations are drawn with (the same)."""


class Context(nn.Module):
    """The prelude, and the adapter that joins what it made of the tokens with a second input."""

    def __init__(self, model: RecurrentLMConfig):
        super().__init__()
        self.layers = nn.ModuleList(LlamaLayer(model, condition=None) for _ in range(model.prelude))
        # The two inputs of the adapter have to be of one size.
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.adapter = nn.Linear(2 * model.width, model.width, bias=False)

    def forward(self, embedded_ntd: Tensor, rotation: Tensor, recompute: bool) -> Tensor:
        """e (N, T, width) of embedded tokens at positions 0 to T - 1."""
        out: Tensor = self.norm(apply_layers(self.layers, embedded_ntd, rotation, recompute=recompute))
        return out

    def read(self, embedded_ntd: Tensor, rotation: Tensor, cache: KVCache, where: Appended) -> Tensor:
        """The same for tokens that come after those in the cache; its first layers are the prelude's."""
        out: Tensor = self.norm(read_layers(self.layers, embedded_ntd, rotation, cache, 0, where))
        return out

    def join(self, e_ntd: Tensor, second_ntd: Tensor) -> Tensor:
        """What enters the core, (N, T, width)."""
        out: Tensor = self.adapter(torch.cat([e_ntd, second_ntd], dim=-1))
        return out


class RecurrentLMBlock(CausalLMBlock):
    """A denoising block with all layers: `layers` has core and coda, through which the two streams go.

    The prelude has a clean stream alone. Clean tokens enter the core as A [e ; 0]: they have no code.
    """

    iterates = True

    def __init__(self, config: RunConfig, trained: NoiseRange, codebook: Tensor):
        """`trained` is the range of noise levels the loss draws from; `codebook` (vocabulary, width) is frozen."""
        model = _model(config)
        super().__init__(config, model.core + model.coda, trained, codebook)
        self.recurrent = model
        self.prelude = Context(model)
        initialise_tokens(self.prelude)

    def _reading(self, cache: ContextCache, tokens_nt: Tensor, where: Appended) -> Tensor:
        e = self.prelude.read(self.embed_tokens(tokens_nt), self.rotary(where.positions), cache, where)
        cache.remember(e, where)
        return self.prelude.join(e, torch.zeros_like(e))

    def _enter(self, embedded_nld: Tensor, rotation: Tensor) -> Streams:
        e = self.prelude(embedded_nld, rotation, self.recompute)
        return self.prelude.join(e, torch.zeros_like(e)), e

    def _noisy_tokens(self, previous_nld: Tensor, z_nld: Tensor, sigma_nl: Tensor) -> Tensor:
        code = self.code_stem(c_in(sigma_nl, self.noise.sigma_data)[..., None] * z_nld)
        return self.prelude.join(previous_nld, code)


class IterationCache(KVCache):
    """Keys and values of prelude, of the core in each iteration, and of the coda.

    An iteration's state attends to the states of earlier tokens in the same iteration, as it does without a cache.
    """

    def __init__(self, model: RecurrentLMConfig, iterations: int, batch_size: int, first_state: Tensor):
        """`first_state` (length + 1, width) is s_0 by position."""
        super().__init__(model, model.prelude + iterations * model.core + model.coda, batch_size, first_state)
        self.iterations, self.first_state = iterations, first_state


class RecurrentLM(TokenModel):
    """The ordinary recurrent-depth model: next-token cross-entropy after a number of iterations that is drawn anew for
    each step, with gradients through the last `model.backprop` of them."""

    iterates = True

    def __init__(self, config: RunConfig):
        model = _model(config)
        super().__init__(model)
        self.recurrent, self.seed = model, config.seed
        self.prelude = Context(model)
        self.core = nn.ModuleList(LlamaLayer(model, condition=None) for _ in range(model.core))
        self.core_norm = RMSNorm(model.width, model.norm_eps)
        self.coda = nn.ModuleList(LlamaLayer(model, condition=None) for _ in range(model.coda))
        initialise_tokens(self)

    def forward(
        self,
        tokens_nl: Tensor,
        iterations: int | None = None,
        state_nld: Tensor | None = None,
        *,
        logits: bool = True,
    ) -> Tensor:
        """Logits (N, L, V) of each token x_i, given those before it.

        Args:
            tokens_nl: the rows.
            iterations: of the core, at least 1; `model.iterations` when not given.
            state_nld: s_0; that of inference when not given.
            logits: give these; or what the head makes them of, (N, L, width).
        """
        count = self._count(iterations)
        inputs = self.shifted(tokens_nl)
        rotation = self.rotary(slice(0, inputs.shape[1]))
        e = self.prelude(self.embed_tokens(inputs), rotation, self.recompute)
        state = self.first_state().to(e.device)[: e.shape[1]].expand_as(e) if state_nld is None else state_nld
        blind = max(0, count - self.recurrent.backprop)
        with torch.no_grad():
            for _ in range(blind):
                state = self._iterate(state, e, rotation)
        for _ in range(count - blind):
            state = self._iterate(state, e, rotation)
        normed = self.norm(apply_layers(self.coda, state, rotation, recompute=self.recompute))
        return self.head(normed) if logits else normed

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles layer by layer, in place.

        Of the whole each number of iterations would be another graph, until PyTorch has seen too many and stops
        compiling: at a step that depends on where training was resumed, and with it the last bits.
        """
        for layer in layers_of(self):
            layer.compile(*args, **kwargs)

    def first_state(self) -> Tensor:
        """s_0 of inference, (length + 1, width) on the CPU, by position: the same for all rows, from the run's seed."""
        source = generator(derive_key(self.seed, "state"))
        return _random_state((self.model.length + 1, self.model.width), source)

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """s_0 as `state` (N, L, width), and `iterations` (N, r), whose second size is the number of iterations.

        A size is known without waiting for the device.
        """
        count = draw_iterations(self.recurrent.iterations, _on_the_host(generator))
        state = _random_state((batch_size, self.model.length, self.model.width), generator)
        return {"state": state, "iterations": torch.zeros((batch_size, count), device=generator.device)}

    def example_draw(self, batch_size: int) -> Draw:
        """A draw with the mean number of iterations."""
        shape = (batch_size, self.model.length, self.model.width)
        iterations = torch.zeros((batch_size, self.recurrent.iterations), device="cpu")
        return {"state": torch.zeros(shape, device="cpu"), "iterations": iterations}

    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Cross-entropy of every token."""
        tokens, size = batch["tokens"], self.model.vocab_size
        count, state = draw["iterations"].shape[1], draw["state"]
        if needs_chunks(tokens, size):
            normed = self(tokens, count, state, logits=False)
            return chunked_cross_entropy(self.head, normed, tokens, size).mean()
        logits = self(tokens, count, state)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def start_cache(self, batch_size: int, iterations: int | None = None) -> IterationCache:
        """A cache for rows of up to `length` tokens, which has read the begin token, each with so many iterations."""
        first_state = self.first_state().to(self.embed_tokens.weight)
        cache = IterationCache(self.recurrent, self._count(iterations), batch_size, first_state)
        self.read(cache, torch.full((batch_size, 1), self.model.begin, device=first_state.device))
        return cache

    def read(self, cache: IterationCache, tokens_nt: Tensor, counts_n: Tensor | None = None) -> Tensor:
        """Append tokens: of row n the first counts_n[n], or all. Returns logits (N, V) of what comes after the last
        token read; a row that is given none has no answer, and what stands there means nothing."""
        where = cache.place(tokens_nt, counts_n)
        rotation, model = self.rotary(where.positions), self.recurrent
        e = self.prelude.read(self.embed_tokens(tokens_nt), rotation, cache, where)
        state, index = cache.first_state[where.positions], model.prelude
        for _ in range(cache.iterations):
            x = self.prelude.join(e, state)
            state = self.core_norm(read_layers(self.core, x, rotation, cache, index, where))
            index += model.core
        x = read_layers(self.coda, state, rotation, cache, index, where)
        cache.advance(where)
        rows = torch.arange(len(tokens_nt), device=x.device)
        return self.head(self.norm(x[rows, (where.counts - 1).clamp_min(0)]))

    def _iterate(self, state_nld: Tensor, e_nld: Tensor, rotation: Tensor) -> Tensor:
        x = self.prelude.join(e_nld, state_nld)
        out: Tensor = self.core_norm(apply_layers(self.core, x, rotation, recompute=self.recompute))
        return out

    def _count(self, iterations: int | None) -> int:
        count = self.recurrent.iterations if iterations is None else iterations
        if count < 1:
            raise ValueError(f"{count} iterations")
        return count


class RecurrentLMFamily(Family):
    """Language models that iterate their core."""

    name = "recurrent_lm"
    task = "generate_text"

    def codebook(self, config: RunConfig) -> Tensor:
        """One row of random directions a token id."""
        model = _model(config)
        return make_codebook(model.vocab_size, model.width, config.codebook.scale, config.seed)

    def cut(self, config: RunConfig) -> list[Piece]:
        """All layers for every block, each of them evaluated once a step; ranges of Gaussian noise."""
        ranges = self.ranges(config)
        trained = widen(ranges, config.blocks.overlap, config.noise)
        depth = config.model.depth
        return [Piece((0, depth), own, wide, depth) for own, wide in zip(ranges, trained, strict=True)]

    def whole(self, config: RunConfig) -> Piece:
        """The end-to-end network, its core as often as it is iterated in the mean."""
        model = _model(config)
        once = model.prelude + model.coda
        evaluations, kept = (once + n * model.core for n in (model.iterations, min(model.iterations, model.backprop)))
        return Piece((0, model.depth), None, None, evaluations, kept)

    def build_block(
        self, config: RunConfig, layers: tuple[int, int], trained: NoiseRange, codebook: Tensor | None
    ) -> RecurrentLMBlock:
        """A block, which always has all layers."""
        assert codebook is not None
        assert layers == (0, config.model.depth)
        return RecurrentLMBlock(config, trained, codebook)

    def build_end_to_end(self, config: RunConfig) -> RecurrentLM:
        """The baseline."""
        return RecurrentLM(config)

    def example_batch(self, config: RunConfig, batch_size: int) -> Batch:
        """Rows of token 0."""
        return {"tokens": torch.zeros((batch_size, _model(config).length), dtype=torch.int64)}


def draw_iterations(mean: int, source: torch.Generator) -> int:
    """1 + Poisson(rate) with log-normal rate (Geiping et al. 2025, section 3.3), shifted to have exactly this mean.

    Args:
        mean: at least 1.
        source: on the CPU.
    """
    if mean == 1:
        return 1
    normal = torch.randn((), generator=source, device="cpu", dtype=torch.float64)
    rate = (math.log(mean - 1) - SPREAD**2 / 2 + SPREAD * normal).exp()
    return 1 + int(torch.poisson(rate, generator=source))


def _on_the_host(source: torch.Generator) -> torch.Generator:
    """A generator on the CPU, made from the state of one on any device; reading that state waits for no device."""
    state = source.get_state().numpy().tobytes()
    return generator(int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little") >> 1)


def _random_state(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """On the generator's device."""
    empty = torch.empty(shape, device=source.device)
    return nn.init.trunc_normal_(empty, std=STATE_STD, a=-3 * STATE_STD, b=3 * STATE_STD, generator=source)


def _model(config: RunConfig) -> RecurrentLMConfig:
    assert isinstance(config.model, RecurrentLMConfig)
    return config.model


register(RecurrentLMFamily())
