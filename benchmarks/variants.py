"""Ideas that did not become options, each still a command: what changes, and what comes of it over several seeds.

    python benchmarks/variants.py own-trajectory configs/demo/vit.yaml --runs runs/own-trajectory --set model.depth=3

Each idea replaces functions of dbtrain in this process and trains a recipe with them; the rows to compare with are
those of the sweep files. The run directories are of use to this program alone, as nobody else replaces the functions.
Figures and conclusions: docs/results.md and docs/lab-notes.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import RunFailed, figures_of, print_tables, train_one
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config
from dbtrain.data.prepare import ensure_prepared
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.codebook import make_codebook, stretch_rows
from dbtrain.diffusion.precondition import weights
from dbtrain.errors import UserError
from dbtrain.inference.classify import Classifier
from dbtrain.inference.runs import evaluation_of, model_of
from dbtrain.model_config import CausalLMConfig
from dbtrain.models import vit
from dbtrain.models.causal_lm import CausalLM, CausalLMFamily
from dbtrain.models.family import Batch, Draw, relays
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.models.vit import CodeReader, ViTBlock
from dbtrain.plan import Kind


@dataclass(frozen=True)
class Variant:
    """An idea, and the recipes that it changes."""

    install: Callable[[], None]
    family: str
    kinds: tuple[Kind, ...] = ("blocks",)
    relays: bool = False
    teacher: bool = False
    """Whether it needs the end-to-end network of every seed, which is trained first."""

    def check(self, config: RunConfig, kind: Kind) -> None:
        """Raises UserError where the recipe would be trained as if there were no such idea."""
        if config.model.family != self.family:
            raise UserError(
                "has none of it", field="model.family", value=config.model.family, mend=f"use {self.family}"
            )
        if kind not in self.kinds:
            raise UserError("has none of it", field="--kind", value=kind, mend=f"use {' or '.join(self.kinds)}")
        if relays(config, kind) != self.relays:
            mend = "set it" if self.relays else "leave it out"
            raise UserError(
                "does not go with it", field="blocks.relay_every", value=config.blocks.relay_every, mend=mend
            )


VARIANTS: dict[str, Variant] = {}
"""By name."""

TEACHERS: dict[int, nn.Module] = {}
"""The end-to-end networks of the seeds, for variants that need them."""


def variant(
    family: str, kinds: tuple[Kind, ...] = ("blocks",), relays: bool = False, teacher: bool = False
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Enter what puts an idea in place under its function's name."""

    def enter(install: Callable[[], None]) -> Callable[[], None]:
        VARIANTS[install.__name__.replace("_", "-")] = Variant(install, family, kinds, relays, teacher)
        return install

    return enter


def _replace(owner: Any, name: str, value: object) -> None:
    setattr(owner, name, value)


@variant("vit")
def codes_random() -> None:
    """Labels' codes in random directions, whatever the width, in place of orthonormal ones."""

    def make(num_classes: int, width: int, scale: float, seed: int) -> Tensor:
        return stretch_rows(torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed)), scale)

    _replace(vit, "make_codebook", make)


@variant("vit")
def codes_simplex() -> None:
    """Labels' codes spread as far as they go: the corners of a simplex, all pairs at the cosine -1 / (classes - 1)."""

    def make(num_classes: int, width: int, scale: float, seed: int) -> Tensor:
        rows = make_codebook(num_classes, width, scale, seed)
        return stretch_rows(rows - rows.mean(dim=0), scale)

    _replace(vit, "make_codebook", make)


@variant("vit")
def codes_narrow() -> None:
    """Labels' codes in random directions of four dimensions; the others are noise alone."""

    def make(num_classes: int, width: int, scale: float, seed: int) -> Tensor:
        rows = torch.zeros(num_classes, width)
        rows[:, :4] = torch.randn(num_classes, 4, generator=torch.Generator().manual_seed(seed))
        return stretch_rows(rows, scale)

    _replace(vit, "make_codebook", make)


def _about_their_mean(rows: Tensor, seen: Tensor, config: RunConfig) -> Tensor:
    """The directions of rows (vocabulary, width) from their mean as codes, at the recipe's length. What is not `seen`
    in the text keeps the random direction that it has without the idea."""
    codes = make_codebook(*rows.shape, config.codebook.scale, config.seed)
    codes[seen] = stretch_rows(rows[seen] - rows[seen].mean(dim=0), config.codebook.scale)
    return codes


def _neighbours(config: RunConfig) -> Tensor:
    """How often each token stands before each other one in the training text, (vocabulary, vocabulary)."""
    assert isinstance(config.model, CausalLMConfig)
    ensure_prepared(config)
    shards, size = ShardSet.open(config.data.shards, "train"), config.model.vocab_size
    text = torch.from_numpy(shards.gather("tokens", np.arange(shards.rows))).long()
    return (text[:, :-1] * size + text[:, 1:]).flatten().bincount(minlength=size**2).view(size, size).double()


def _bigram_codes(config: RunConfig) -> Tensor:
    counts = _neighbours(config)
    sides = torch.cat([counts, counts.T], dim=1)
    expected = sides.sum(dim=1, keepdim=True) * sides.sum(dim=0) / sides.sum()
    information = torch.where(sides > 0, sides / expected, 1.0).log().clamp_min(0.0)
    left, singular, _ = torch.linalg.svd(information, full_matrices=False)
    rows = torch.zeros(len(counts), config.model.width)
    kept = min(rows.shape[1], left.shape[1])
    rows[:, :kept] = (left * singular.sqrt())[:, :kept].float()
    return _about_their_mean(rows, sides.sum(dim=1) > 0, config)


@variant("causal_lm")
def codes_bigram() -> None:
    """Tokens' codes by what stands beside them in the training text: the singular vectors, at the root of the singular
    values, of the positive pointwise mutual information of neighbours, both sides (Levy, Goldberg 2014)."""

    made: dict[int, Tensor] = {}

    def codebook(_self: CausalLMFamily, config: RunConfig) -> Tensor:
        # Plan, training and assembly must have the same bytes, which another number of threads may change.
        if config.seed not in made:
            made[config.seed] = _bigram_codes(config)
        return made[config.seed]

    _replace(CausalLMFamily, "codebook", codebook)


@variant("causal_lm", teacher=True)
def codes_trained() -> None:
    """Tokens' codes from the embedding that the end-to-end network of the same recipe has learnt."""

    def codebook(_self: CausalLMFamily, config: RunConfig) -> Tensor:
        teacher = TEACHERS[config.seed]
        assert isinstance(teacher, CausalLM)
        return _about_their_mean(teacher.embed_tokens.weight.detach(), _neighbours(config).sum(dim=1) > 0, config)

    _replace(CausalLMFamily, "codebook", codebook)


@variant("vit")
def large_code_stem() -> None:
    """The projection of the noisy code starts as all matrices do, at Glorot's scale, and not at 0.02."""
    _replace(CodeReader, "initialise", lambda self: nn.init.trunc_normal_(self.query, std=0.02))


@variant("vit")
def analytic_hint() -> None:
    """What the noisy code says of the label is added to the logits, <code of the label, z> / sigma^2, which is exact
    for codes of one length; what a block learns beside it is what the image says."""
    denoise = ViTBlock.denoise

    def with_hint(self: ViTBlock, features_ntd: Tensor, z_nd: Tensor, sigma_n: Tensor) -> Tensor:
        # No matrix product: autocast would compute it in bfloat16, and 1 / sigma^2 be merciless to its digits.
        said: Tensor = (z_nd.float()[:, None] * self.codebook).sum(dim=-1) / sigma_n[:, None] ** 2
        return denoise(self, features_ntd, z_nd, sigma_n).float() + said

    _replace(ViTBlock, "denoise", with_hint)


@variant("vit")
def own_trajectory() -> None:
    """A block's noisy code comes from its own answer to pure noise at the top of its range, as if the chain had walked
    from there to each noise level with that answer (softmax bridge). It knows no label."""

    def training_loss(self: ViTBlock, batch: Batch, draw: Draw) -> Tensor:
        features, sigma, eps = self.features(batch), draw["sigma"], draw["eps"]
        top = torch.full_like(sigma, self.trained.high)
        with torch.no_grad():
            belief = self.denoise(features, self.trained.high * eps, top).float().softmax(dim=-1)
        walked = 1.0 - (sigma / self.noise.sigma_max)[:, None]
        logits = self.denoise(features, sigma[:, None] * eps + walked * (belief @ self.codebook), sigma).float()
        loss = F.cross_entropy(logits, batch["label"], reduction="none")
        return (weights(self.noise.weight, sigma, self.noise.sigma_data) * loss).mean()

    _replace(ViTBlock, "training_loss", training_loss)


@variant("vit", relays=True)
def relay_without_belief() -> None:
    """A relayed block goes on from the features of the block before, and answers by itself: the belief that comes down
    the chain is not added to its logits, in training and in inference."""
    log_probs = Classifier.log_probs

    def by_itself(
        self: Classifier, features: Tensor, index: int, z: Tensor, sigma: float, belief: Tensor | None = None
    ) -> Tensor:
        return log_probs(self, features, index, z, sigma)

    _replace(ViTBlock, "_complete", lambda self, logits, batch: logits.float())
    _replace(Classifier, "log_probs", by_itself)


@variant("masked_lm", kinds=("blocks", "end_to_end"))
def self_conditioning() -> None:
    """A masked language model is given its own estimate of the text, which it makes of the same masked text without one
    (Chen, Zhang, Hinton 2022): in half the training rows, without a gradient, and always in evaluation."""
    init, forward = MaskedLM.__init__, MaskedLM.forward

    def with_estimate(self: MaskedLM, *args: Any) -> None:
        init(self, *args)
        self.estimate = nn.Linear(self.mask_id, self.embedding.embedding_dim, bias=False)
        nn.init.zeros_(self.estimate.weight)

    def twice(self: MaskedLM, tokens_nl: Tensor, level_n: Tensor, *, logits: bool = True) -> Tensor:
        with torch.no_grad():
            belief = forward(self, tokens_nl, level_n).float().softmax(dim=-1)
        if self.training:
            belief = belief * (torch.rand(len(belief), 1, 1, device=belief.device) < 0.5)
        added = self.estimate(belief)
        handle = self.embedding.register_forward_hook(lambda _module, _inputs, output: output + added)
        try:
            return forward(self, tokens_nl, level_n, logits=logits)
        finally:
            handle.remove()

    _replace(MaskedLM, "__init__", with_estimate)
    _replace(MaskedLM, "forward", twice)


def main() -> None:
    """Train, evaluate, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=[*VARIANTS])
    parser.add_argument("config", type=Path)
    parser.add_argument("--kind", choices=["blocks", "end_to_end"], default="blocks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parser.parse_args()
    chosen = VARIANTS[arguments.variant]
    chosen.install()
    found: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        folder = arguments.runs / f"{arguments.variant}-{arguments.kind}-seed{seed}"
        try:
            config = load_config(arguments.config, [*arguments.overrides, f"seed={seed}"])
            chosen.check(config, arguments.kind)
            if chosen.teacher:
                teacher = train_one(config, "end_to_end", arguments.runs / f"teacher-seed{seed}")
                TEACHERS[seed] = model_of(teacher).modules[0]
            evaluation = evaluation_of(train_one(config, arguments.kind, folder))
        except (UserError, RunFailed) as error:
            parser.exit(2, f"{error}\n")
        for name, value in figures_of(evaluation).items():
            found.setdefault(name, []).append(value)
    print_tables(evaluation.metric, {arguments.variant: found}, len(arguments.seeds))


if __name__ == "__main__":
    main()
