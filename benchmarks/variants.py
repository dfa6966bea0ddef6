"""Ideas that did not become options, each still a command: what changes, and what comes of it over several seeds.

    python benchmarks/variants.py own-trajectory configs/demo/vit.yaml --runs runs/own-trajectory --set model.depth=3

Each idea replaces one function of dbtrain in this process and trains a recipe with it; the rows to compare with are
those of the sweep files. The run directories are of use to this program alone, as nobody else replaces the function.
Figures and conclusions: docs/results.md and docs/lab-notes.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import RunFailed, figures_of, print_tables, train_one
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.config_file import load_config
from dbtrain.diffusion.codebook import make_codebook, stretch_rows
from dbtrain.diffusion.precondition import weights
from dbtrain.errors import UserError
from dbtrain.inference.classify import Classifier
from dbtrain.inference.runs import evaluation_of
from dbtrain.models import vit
from dbtrain.models.family import Batch, Draw
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.models.vit import CodeReader, ViTBlock

VARIANTS: dict[str, Callable[[], None]] = {}
"""Name -> what puts it in place."""


def variant(install: Callable[[], None]) -> Callable[[], None]:
    """Enter it under its function's name."""
    VARIANTS[install.__name__.replace("_", "-")] = install
    return install


def _replace(owner: Any, name: str, value: object) -> None:
    setattr(owner, name, value)


@variant
def codes_random() -> None:
    """Labels' codes in random directions, whatever the width, in place of orthonormal ones."""

    def make(num_classes: int, width: int, scale: float, seed: int) -> Tensor:
        return stretch_rows(torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed)), scale)

    _replace(vit, "make_codebook", make)


@variant
def codes_simplex() -> None:
    """Labels' codes spread as far as they go: the corners of a simplex, all pairs at the cosine -1 / (classes - 1)."""

    def make(num_classes: int, width: int, scale: float, seed: int) -> Tensor:
        rows = make_codebook(num_classes, width, scale, seed)
        return stretch_rows(rows - rows.mean(dim=0), scale)

    _replace(vit, "make_codebook", make)


@variant
def codes_narrow() -> None:
    """Labels' codes in random directions of four dimensions; the others are noise alone."""

    def make(num_classes: int, width: int, scale: float, seed: int) -> Tensor:
        rows = torch.zeros(num_classes, width)
        rows[:, :4] = torch.randn(num_classes, 4, generator=torch.Generator().manual_seed(seed))
        return stretch_rows(rows, scale)

    _replace(vit, "make_codebook", make)


@variant
def large_code_stem() -> None:
    """The projection of the noisy code starts as all matrices do, at Glorot's scale, and not at 0.02."""
    _replace(CodeReader, "initialise", lambda self: nn.init.trunc_normal_(self.query, std=0.02))


@variant
def own_trajectory() -> None:
    """A block's noisy code comes from its own answer at the top of its range, by the chain's softmax bridge, and knows
    no label: what inference gives it, but for whose answer it is."""

    def training_loss(self: ViTBlock, batch: Batch, draw: Draw) -> Tensor:
        features, sigma, label = self.features(batch), draw["sigma"], batch["label"]
        top = torch.full_like(sigma, self.trained.high)
        start = top[:, None] * draw["eps"]
        with torch.no_grad():
            belief = self.denoise(features, start, top).float().softmax(dim=-1)
        kept = (sigma / top)[:, None]
        logits = self.denoise(features, kept * start + (1.0 - kept) * (belief @ self.codebook), sigma).float()
        loss = F.cross_entropy(logits, label, reduction="none")
        return (weights(self.noise.weight, sigma, self.noise.sigma_data) * loss).mean()

    _replace(ViTBlock, "training_loss", training_loss)


@variant
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


@variant
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
            belief = belief * (torch.rand(len(belief), 1, 1) < 0.5)
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
    VARIANTS[arguments.variant]()
    found: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        folder = arguments.runs / f"{arguments.variant}-{arguments.kind}-seed{seed}"
        try:
            config = load_config(arguments.config, [*arguments.overrides, f"seed={seed}"])
            evaluation = evaluation_of(train_one(config, arguments.kind, folder))
        except (UserError, RunFailed) as error:
            parser.exit(2, f"{error}\n")
        for name, value in figures_of(evaluation).items():
            found.setdefault(name, []).append(value)
    print_tables(evaluation.metric, {arguments.variant: found}, len(arguments.seeds))


if __name__ == "__main__":
    main()
