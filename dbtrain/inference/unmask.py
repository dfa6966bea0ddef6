"""Writing and filling in text with an assembled masked language model, by ancestral unmasking."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.diffusion.masking import MaskSchedule, level_grid, partition_levels
from dbtrain.diffusion.partition import owner
from dbtrain.errors import UserError
from dbtrain.inference.decoding import check_seed, check_steps, choose
from dbtrain.model_config import MaskedLMConfig
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.randomness import derive_key, keyed_uniform

GENERATE_BATCH = 64
"""Windows that go through the network at a time."""


class TextUnmasker:
    """An assembled masked language model. `generate` and `infill` are the front doors; `network` is for evaluation."""

    def __init__(self, model: AssembledModel):
        assert isinstance(model.config.model, MaskedLMConfig)
        assert model.tokenizer is not None
        self.model = model
        self.config = model.config
        self.tokenizer = load_tokenizer(model.tokenizer)
        self.length = model.config.model.length
        self.mask_id = model.config.model.vocab_size
        self.schedule = MaskSchedule(model.config.model.mask_schedule)
        self.ranges = partition_levels(self.schedule, model.config.blocks.count)
        """The blocks' ranges of mask levels, the most masked first; for a baseline, those its blocks would have."""

    def network(self, block: int) -> MaskedLM:
        """The module that fills in masks in range number `block`; a baseline has one for all."""
        module = self.model.modules[0 if self.model.end_to_end else block]
        assert isinstance(module, MaskedLM)
        return module

    def generate(
        self,
        count: int = 1,
        *,
        steps: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """`count` texts, a window each. A text depends on its number and the seed, not on how many are asked for.

        Args:
            steps: unmasking steps at equal decrements of alpha, each by the block that owns its level; `chain.steps`
                when not given. Fewer than blocks leave some of them out.
            temperature: divides the logits; near 0 the likeliest token wins.
            top_p: tokens are drawn from the smallest set that has this probability.

        Raises:
            UserError: count, steps, temperature or top_p is out of its range.
        """
        if count < 1:
            raise UserError("has to be at least 1", field="--count", value=count)
        texts = []
        for first in range(0, count, GENERATE_BATCH):
            rows = np.arange(first, min(first + GENERATE_BATCH, count), dtype=np.int64)
            blank = torch.full((len(rows), self.length), self.mask_id, device=self.model.device)
            tokens = self._unmask(blank, rows, steps, temperature, top_p, seed)
            texts += [self._text(row) for row in tokens.cpu().numpy()]
        return texts

    def infill(
        self,
        parts: Sequence[str | int],
        *,
        steps: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The text of `parts`: strings are kept as they are, an integer is a gap of so many tokens to fill in.

        The parts stand at the start of the window. What is left of it is filled in along with the gaps and dropped: in
        training, too, a text goes on to the end of its window. Unmasking starts at the level where as many tokens are
        masked as there are to fill in, so few gaps in much text go to the last blocks alone.

        Args:
            steps: as in `generate`, from the level where unmasking starts.
            temperature: as in `generate`.
            top_p: as in `generate`.

        Raises:
            UserError: there is no gap, the parts do not fit into a window, or an option is out of its range.
        """
        pieces = [self._piece(part) for part in parts]
        asked = sum(len(piece) for piece in pieces)
        if not any(isinstance(part, int) for part in parts):
            raise UserError("has no gap to fill in", field="--infill", value=list(parts), mend="write [[12]]")
        if asked > self.length:
            raise UserError(
                f"is {asked} tokens long, gaps included; a window of the model has {self.length}",
                field="--infill",
                value=list(parts),
                mend="give less of the text around the gaps",
            )
        window = np.full((1, self.length), self.mask_id, dtype=np.int64)
        window[0, :asked] = np.concatenate(pieces)
        tokens = torch.from_numpy(window).to(self.model.device)
        filled = self._unmask(tokens, np.zeros(1, np.int64), steps, temperature, top_p, seed)[0].cpu().numpy()
        answer, at = [], 0
        for part, piece in zip(parts, pieces, strict=True):
            # Bytes of a gap need not be whole characters; what was given is told as it was given.
            answer.append(part if isinstance(part, str) else self._text(filled[at : at + part]))
            at += len(piece)
        return "".join(answer)

    def _text(self, ids: npt.NDArray[np.int64]) -> str:
        """The text of ids, an empty line between documents."""
        ends = np.flatnonzero(ids == self.tokenizer.separator)
        return "\n\n".join(self.tokenizer.decode(document) for document in np.split(ids, ends))

    def _piece(self, part: str | int) -> npt.NDArray[np.int64]:
        if isinstance(part, str):
            return np.asarray(self.tokenizer.encode(part, field="--infill"), dtype=np.int64)
        if part < 1:
            raise UserError("a gap has at least one token", field="--infill", value=part)
        if part > self.length:
            raise UserError(f"a window of the model has {self.length} tokens", field="--infill", value=part)
        return np.full(part, self.mask_id, dtype=np.int64)

    @torch.inference_mode()
    def _unmask(
        self,
        tokens_nl: Tensor,
        rows: npt.NDArray[np.int64],
        steps: int | None,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Tensor:
        """Replace the mask ids of `tokens_nl`, as many in each row; `rows` key the random numbers.

        One step from alpha to alpha' reveals each masked token with probability (alpha' - alpha) / (1 - alpha): Sahoo
        et al. 2024, equation 7. At equal decrements that is 1 / (steps left): the last step reveals all that is left.
        """
        steps = self.config.chain.steps if steps is None else steps
        assert steps is not None, "the family's defaults give one"
        check_seed(seed)
        _check(steps, temperature, top_p)
        tokens_nl = tokens_nl.clone()
        share = float((tokens_nl[0] == self.mask_id).double().mean())
        for step, level in enumerate(level_grid(self.schedule, steps, share)):
            numbers = torch.from_numpy(keyed_uniform(derive_key(seed, "unmask", step), rows, 2 * self.length))
            when_nl, which_nl = numbers.to(tokens_nl.device).chunk(2, dim=1)
            reveal_nl = (tokens_nl == self.mask_id) & (when_nl < 1.0 / (steps - step))
            acting_n = reveal_nl.any(dim=1)
            if not acting_n.any():
                continue
            seen_nl = tokens_nl[acting_n]
            levels_n = torch.full((len(seen_nl),), level, device=seen_nl.device)
            logits_nlv = self.network(owner(self.ranges, level))(seen_nl, levels_n)
            log_probs = logits_nlv[reveal_nl[acting_n]].float().log_softmax(dim=-1)
            tokens_nl[reveal_nl] = choose(log_probs, which_nl[reveal_nl], temperature=temperature, top_p=top_p)
        return tokens_nl


def _check(steps: int, temperature: float, top_p: float) -> None:
    """Raises UserError for an option out of its range; NaN is out of every range."""
    check_steps(steps)
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise UserError(
            "has to be above 0", field="--temperature", value=temperature, mend="--temperature 0.01 is nearly greedy"
        )
    if not 0.0 < top_p <= 1.0:
        raise UserError("has to be above 0 and at most 1", field="--top-p", value=top_p)
