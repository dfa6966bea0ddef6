"""A language model at work on a batch of texts: it has read so much of each, and says what may come next.

A block is asked through `start_cache`, `read` and `denoise` alone, an end-to-end network through `start_cache` and
`read` (`dbtrain.models.causal_lm` says what they mean), so other families of language models fit in. Evaluation, which
knows the text, asks a block through `context` and `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.diffusion.chain import read_out, run_chain, sigma_grid
from dbtrain.diffusion.partition import owner
from dbtrain.randomness import derive_key, keyed_normal, keyed_uniform


class TextSession(Protocol):
    """Texts of N rows, each as long as it happens to be."""

    def read(self, tokens_nt: Tensor, counts_n: Tensor) -> None:
        """Append the first counts_n[n] tokens of each row n."""

    def probabilities(self, index: int) -> Tensor:
        """Of the next token, (N, V); without meaning for rows that `read` gave nothing the last time.

        Args:
            index: how often this was asked before: the key of the starting noises.
        """


def open_session(model: AssembledModel, keys: Sequence[int], steps: int | None, readout: str | None) -> TextSession:
    """A session of `len(keys)` rows, at the begin token.

    Args:
        keys: of each row's starting noises.
        steps: of the chain; `chain.steps` or one a block when not given. Iterations of an end-to-end network that
            has any; those of its configuration when not given.
        readout: `chain.readout` when not given.
    """
    if model.end_to_end:
        return PlainSession(model, len(keys), steps)
    return ChainSession(model, keys, steps or chain_steps(model), readout or model.config.chain.readout)


def chain_steps(model: AssembledModel) -> int:
    """Steps of a walk where nobody says otherwise."""
    return model.config.chain.steps or len(model.modules)


class PlainSession:
    """An end-to-end network, with one cache."""

    def __init__(self, model: AssembledModel, rows: int, iterations: int | None):
        self._module = cast(Any, model.modules[0])
        free = {} if iterations is None else {"iterations": iterations}
        self._cache = self._module.start_cache(rows, **free)
        self._logits: Tensor | None = None

    def read(self, tokens_nt: Tensor, counts_n: Tensor) -> None:
        """Pass the tokens through the network."""
        self._logits = self._module.read(self._cache, tokens_nt, counts_n)

    def probabilities(self, index: int) -> Tensor:
        """What followed from the last tokens read."""
        assert self._logits is not None
        return self._logits.float().softmax(dim=-1)


class ChainSession:
    """Blocks, with a cache each; those that the read-out does not need are left out."""

    def __init__(self, model: AssembledModel, keys: Sequence[int], steps: int, readout: str):
        self._model, self._keys, self._steps, self._readout = model, keys, steps, readout
        self._stop_after = 1 if readout.startswith("first") else None
        self._noises = model.config.chain.start_noises if readout.endswith("_mean") else 1
        sigmas = sigma_grid(model.ranges, steps, model.config.noise)[: self._stop_after]
        self._modules: dict[int, Any] = {}
        for index in sorted({owner(model.ranges, sigma) for sigma in sigmas}):
            self._modules[index] = model.modules[index]
        self._caches = {index: module.start_cache(len(keys)) for index, module in self._modules.items()}

    def read(self, tokens_nt: Tensor, counts_n: Tensor) -> None:
        """Let every block read the tokens."""
        for index, module in self._modules.items():
            module.read(self._caches[index], tokens_nt, counts_n)

    def probabilities(self, index: int) -> Tensor:
        """Walk the chain from each starting noise, and read it out."""
        model = self._model
        assert model.codebook is not None
        traces = [
            run_chain(
                self._log_probs,
                model.ranges,
                model.codebook,
                model.config.noise,
                self._steps,
                model.config.chain.bridge,
                model.config.noise.sigma_max * self._start(index, noise),
                self._stop_after,
                fresh=partial(self._fresh, index, noise),
            )
            for noise in range(self._noises)
        ]
        return read_out(traces, self._readout)

    def _log_probs(self, block: int, z_nd: Tensor, sigma: float) -> Tensor:
        sigmas = torch.full((len(z_nd),), sigma, device=z_nd.device)
        logits: Tensor = self._modules[block].denoise(self._caches[block], z_nd.float(), sigmas)
        return logits.float().log_softmax(dim=-1)

    def _start(self, index: int, noise: int) -> Tensor:
        """Standard normal (N, code width): of (each row's key, noise number, how many tokens were asked for before)."""
        assert self._model.codebook is not None
        width, place = self._model.codebook.shape[1], np.array([index], dtype=np.int64)
        rows = [keyed_normal(derive_key(key, "start", noise), place, width) for key in self._keys]
        return torch.cat(rows).to(self._model.device)

    def _fresh(self, index: int, noise: int, step: int) -> Tensor:
        """Uniform numbers (N, 1 + code width) for the bridge `sample`: also of the number of the step."""
        assert self._model.codebook is not None
        lanes, place = 1 + self._model.codebook.shape[1], np.array([index], dtype=np.int64)
        rows = [keyed_uniform(derive_key(key, "bridge", noise, step), place, lanes) for key in self._keys]
        return torch.from_numpy(np.concatenate(rows)).to(self._model.device)
