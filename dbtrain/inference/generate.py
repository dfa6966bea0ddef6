"""Writing text with an assembled language model: a walk through the blocks for each token, or a baseline's one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import READOUTS
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.diffusion.chain import ChainTrace, run_chain
from dbtrain.errors import UserError
from dbtrain.inference.decoding import Decoding, check_seed, check_steps
from dbtrain.inference.text_sessions import chain_steps, open_session
from dbtrain.model_config import TextModelConfig
from dbtrain.randomness import derive_key, keyed_normal, keyed_uniform

GENERATE_BATCH = 64
"""Prompts that go through the network at a time."""
DEFAULT_TOKENS = 200
"""At most so many tokens are written where the caller names no number."""

Ids = npt.NDArray[np.int64]


class TextGenerator:
    """An assembled language model. `generate` is the front door; `contexts` and what follows serve evaluation."""

    def __init__(self, model: AssembledModel):
        assert isinstance(model.config.model, TextModelConfig)
        assert model.tokenizer is not None
        self.model = model
        self.config = model.config
        self.tokenizer = load_tokenizer(model.tokenizer)
        self.length = model.config.model.length

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        steps: int | None = None,
        readout: str | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Go on from each prompt until the text ends or has `tokens` more tokens; returns what comes after the prompts.

        A prompt's continuation is a function of (model, prompt, options, seed), and of how often the same prompt was
        asked before it in the list: other prompts change nothing but rounding.

        Args:
            prompts: texts; together with what is written each has to fit into the model's window.
            tokens: at most so many; when not given, as many as fit, at most 200.
            temperature: divides the log-probabilities.
            top_p: tokens are drawn from the smallest set that has this probability.
            greedy: always the likeliest token.
            steps: of the chain, at each token; `chain.steps` when not given, or one a block. Iterations of an
                end-to-end network that has any; `model.iterations` when not given.
            readout: what the token is taken from, one of `dbtrain.config.READOUTS`; `chain.readout` when not given.
            seed: of starting noises and of the choice.

        Raises:
            UserError: a prompt is empty or too long, or an option is out of its range.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        decoding = Decoding(temperature, top_p, greedy)
        check_seed(seed)
        self.check_chain(steps, readout)
        ids = [self._encode(prompt) for prompt in asked]
        counts = [self._room(each, tokens) for each in ids]
        times = [asked[:index].count(prompt) for index, prompt in enumerate(asked)]
        keys = [derive_key(seed, "generate", *each) for each in zip(asked, times, strict=True)]
        written = self.continue_ids(ids, counts, keys, decoding, steps, readout)
        return [self.tokenizer.decode(each) for each in written]

    def continue_ids(
        self,
        prompts: Sequence[Ids],
        counts: Sequence[int],
        keys: Sequence[int],
        decoding: Decoding,
        steps: int | None = None,
        readout: str | None = None,
    ) -> list[Ids]:
        """Token ids that follow each prompt, at most `counts[n]`; the last is the separator where the text has ended.

        Args:
            prompts: token ids, at least one each.
            counts: with its prompt each fits into the window.
            keys: of each prompt's random numbers.
        """
        written: list[Ids] = []
        for first in range(0, len(prompts), GENERATE_BATCH):
            part = slice(first, first + GENERATE_BATCH)
            written += self._continue(prompts[part], counts[part], keys[part], decoding, steps, readout)
        return written

    def check_chain(self, steps: int | None, readout: str | None) -> None:
        """Whether the model can be asked so.

        Raises:
            UserError: it cannot.
        """
        known = () if self.model.end_to_end else READOUTS
        if readout is not None and readout not in known:
            mend = f"use one of {', '.join(known)}" if known else "leave it out: an end-to-end network says one thing"
            raise UserError("is not a read-out of this model", field="--readout", value=readout, mend=mend)
        if steps is None:
            return
        check_steps(steps)
        if self.model.end_to_end:
            if self.model.modules[0].iterates:
                return
            raise UserError(
                "has no meaning for an end-to-end network", field="--steps", value=steps, mend="leave it out"
            )
        blocks = len(self.model.modules)
        if steps < blocks:
            mend = f"give at least {blocks}"
            raise UserError(f"would skip some of the {blocks} blocks", field="--steps", value=steps, mend=mend)

    @torch.inference_mode()
    def logits(self, tokens_nl: Tensor, iterations: int | None = None) -> Tensor:
        """Of each token, given those before it, by an end-to-end network: (N, L, V).

        Args:
            iterations: of a network that has any; `model.iterations` when not given.
        """
        free = {} if iterations is None else {"iterations": iterations}
        logits: Tensor = self.model.modules[0](tokens_nl, **free)
        return logits.float()

    @torch.inference_mode()
    def contexts(self, tokens_nl: Tensor) -> list[Any]:
        """By block, what it makes of known rows before it sees any noise."""
        return [module.context(tokens_nl) for module in self.model.modules]  # type: ignore[operator]

    @torch.inference_mode()
    def log_probs(self, contexts: Sequence[Any], index: int, z: Tensor, sigma: float) -> Tensor:
        """What block `index` says of each token, given those before it and its code at sigma.

        Args:
            contexts: of the rows.
            z: noisy codes, (N * L, code width).

        Returns:
            (N * L, V) float32.
        """
        n = len(z) // self.length
        sigmas = torch.full((n, 1), sigma, device=z.device)
        module: Any = self.model.modules[index]
        logits: Tensor = module.answer(contexts[index], z.float().view(n, self.length, -1), sigmas)
        return logits.float().log_softmax(dim=-1).flatten(0, 1)

    @torch.inference_mode()
    def trace(self, contexts: Sequence[Any], rows: Ids, noise: int, steps: int | None = None) -> ChainTrace:
        """Walk the chain for every token of known rows at once, from starting noise number `noise`; `rows` key it.

        It has `steps` steps, or as many as the configuration says. The chain of a token sees the tokens before it
        alone, so each says what it would say in writing.
        """
        config, codebook = self.config, self.model.codebook
        assert codebook is not None
        return run_chain(
            lambda index, z, sigma: self.log_probs(contexts, index, z, sigma),
            self.model.ranges,
            codebook,
            config.noise,
            steps or chain_steps(self.model),
            config.chain.bridge,
            config.noise.sigma_max * self.start(rows, noise),
            fresh=lambda step: self.fresh(rows, noise, step),
        )

    def start(self, rows: Ids, noise: int) -> Tensor:
        """Standard normal (N * L, code width), one row a token: a function of (run's seed, noise, row, place)."""
        assert self.model.codebook is not None
        width = self.model.codebook.shape[1]
        normal = keyed_normal(derive_key(self.config.seed, "start", noise), self._places(rows), width)
        return normal.to(self.model.device)

    def fresh(self, rows: Ids, noise: int, step: int) -> Tensor:
        """Uniform numbers (N * L, 1 + code width) for the bridge `sample`: also of the number of the step."""
        assert self.model.codebook is not None
        key = derive_key(self.config.seed, "bridge", noise, step)
        uniform = keyed_uniform(key, self._places(rows), 1 + self.model.codebook.shape[1])
        return torch.from_numpy(uniform).to(self.model.device)

    def _places(self, rows: Ids) -> Ids:
        """A number a token of known rows."""
        return (rows[:, None] * self.length + np.arange(self.length)).ravel()

    def _encode(self, prompt: str) -> Ids:
        ids = self.tokenizer.encode(prompt, field="--prompt")
        if len(ids) == 0:
            mend = "give some text to go on from"
            raise UserError("is empty", field="--prompt", value=prompt, mend=mend)
        if len(ids) >= self.length:
            raise UserError(
                f"is {len(ids)} tokens long; the model's window of {self.length} has to hold it and what is written",
                field="--prompt",
                value=prompt if len(prompt) <= 60 else prompt[:60] + "...",
                mend=f"give at most {self.length - 1} tokens",
            )
        return ids

    def _room(self, prompt: Ids, tokens: int | None) -> int:
        """How many tokens to write after a prompt."""
        room = self.length - len(prompt)
        if tokens is None:
            return min(room, DEFAULT_TOKENS)
        if tokens < 1:
            raise UserError("has to be at least 1", field="--tokens", value=tokens)
        if tokens > room:
            raise UserError(
                f"do not fit behind a prompt of {len(prompt)} into the model's window of {self.length}",
                field="--tokens",
                value=tokens,
                mend=f"give at most {room}, or a shorter prompt",
            )
        return tokens

    @torch.inference_mode()
    def _continue(
        self,
        prompts: Sequence[Ids],
        counts: Sequence[int],
        keys: Sequence[int],
        decoding: Decoding,
        steps: int | None,
        readout: str | None,
    ) -> list[Ids]:
        """What `continue_ids` does, for one batch."""
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padded = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.from_numpy(prompt)
        session = open_session(self.model, keys, steps, readout)
        session.read(padded, lengths)
        wanted = torch.tensor(counts, device=device)
        going = torch.ones_like(wanted, dtype=torch.bool)
        done = torch.zeros_like(wanted)
        written: list[Tensor] = []
        while True:
            index = len(written)
            uniform = [keyed_uniform(derive_key(key, "choice"), np.array([index]), 1)[:, 0] for key in keys]
            token = decoding(session.probabilities(index), torch.from_numpy(np.concatenate(uniform)).to(device))
            written.append(token)
            done += going
            going = going & (token != self.tokenizer.separator) & (done < wanted)
            if not going.any():
                break
            session.read(token[:, None], going.long())
        whole = torch.stack(written, dim=1).cpu().numpy()
        return [row[:count] for row, count in zip(whole, done.tolist(), strict=True)]
