"""What inference costs: a chain of B steps beside one forward of the baseline, and text written token by token.

    python benchmarks/inference.py [--json] [--threads 1]

* images: one walk of the paper's ViT in three blocks beside one forward of the end-to-end network of the same depth, on
  the same batch. The two take turns; the ratio is the median of the pairs' ratios.
* windows: the same for a causal language model and whole windows of text.
* writing: one more token behind a text in the cache, chain and baseline by turns; tokens around number 10 and around
  number 500, by turns; and tokens a second with the cache, and without, where each token reads the text anew.

Weights are those of the start: they change no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config_file import parse_config
from dbtrain.data.text.tokenizer import ByteTokenizer
from dbtrain.inference.classify import Classifier
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.text_sessions import TextSession, open_session
from dbtrain.models import family_of
from dbtrain.plan import DatasetFacts, Kind
from dbtrain.training.planner import build_module, make_plan

BLOCKS = 3
EARLY, LATE = 10, 500
"""Numbers of the tokens whose times are compared."""
VIT: dict[str, Any] = {
    "family": "vit",
    "image_size": 32,
    "channels": 3,
    "num_classes": 100,
    "patch_size": 4,
    "depth": 12,
    "width": 128,
    "heads": 4,
    "mlp_width": 512,
}
LM: dict[str, Any] = {
    "family": "causal_lm",
    "length": 512,
    "vocab_size": 257,
    "depth": 12,
    "width": 512,
    "heads": 8,
    "mlp_width": 1376,
}
FACTS: dict[str, Any] = {
    "sha256": "0" * 64,
    "train_rows": 1,
    "test_rows": 1,
    "class_names": (),
    "mean": (),
    "std": (),
    "vocab_size": None,
    "separator": None,
    "tokenizer_sha256": None,
}


def untrained(kind: Kind, model: dict[str, Any], facts: DatasetFacts, readout: str) -> AssembledModel:
    """A model as it is loaded from its folder, with first weights; the read-out is one walk's."""
    config = parse_config(
        {
            "name": "inference-benchmark",
            "model": model,
            "blocks": {"count": BLOCKS},
            "chain": {"readout": readout},
            "training": {"steps": 1, "batch_size": 1},
        }
    )
    plan, family = make_plan(config, kind, facts), family_of(config)
    codebook = family.codebook(config) if kind == "blocks" else None
    modules = [build_module(family, config, block.layers, block.trained, codebook) for block in plan.blocks]
    return AssembledModel(
        config=config,
        plan=plan,
        modules=tuple(module.eval().requires_grad_(False) for module in modules),
        codebook=codebook,
        weights="raw",
        steps=(1,) * len(modules),
        sha256="0" * 64,
        device=torch.device("cpu"),
        tokenizer=ByteTokenizer().to_bytes() if facts.kind == "text" else None,
    )


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_turns(first: Callable[[], object], second: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Median seconds of either, and the median of the pairs' ratios first / second."""
    times = [(seconds(first), seconds(second)) for _ in range(pairs + 1)][1:]
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times)


def images(batch: int, pairs: int) -> dict[str, float]:
    """A walk over a batch of images beside a forward of the baseline."""
    names = tuple(str(label) for label in range(VIT["num_classes"]))
    image = {"kind": "image", "shape": (3, 32, 32), "class_names": names, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    facts = DatasetFacts.model_validate(FACTS | image)
    chain = Classifier(untrained("blocks", VIT, facts, "product"))
    whole = Classifier(untrained("end_to_end", VIT, facts, "product"))
    pixels, positions = torch.randn(batch, 3, 32, 32), np.arange(batch)
    walk, forward, ratio = by_turns(
        lambda: chain.probabilities(pixels, positions), lambda: whole.probabilities(pixels, positions), pairs
    )
    return {"batch_size": batch, "chain_ms": walk * 1e3, "baseline_ms": forward * 1e3, "ratio": ratio}


def language_models() -> tuple[AssembledModel, AssembledModel]:
    """Blocks and baseline."""
    text = {"kind": "text", "shape": (LM["length"],), "vocab_size": LM["vocab_size"], "separator": 256}
    facts = DatasetFacts.model_validate(FACTS | text)
    return untrained("blocks", LM, facts, "last"), untrained("end_to_end", LM, facts, "last")


def windows(models: Sequence[AssembledModel], pairs: int) -> dict[str, float]:
    """A walk for every token of a window at once beside a forward of the baseline."""
    chain, whole = (TextGenerator(model) for model in models)
    tokens, rows = torch.zeros((1, LM["length"]), dtype=torch.int64), np.zeros(1, dtype=np.int64)
    walk, forward, ratio = by_turns(
        lambda: chain.trace(chain.contexts(tokens), rows, 0), lambda: whole.logits(tokens).log_softmax(dim=-1), pairs
    )
    return {"windows": len(tokens), "chain_ms": walk * 1e3, "baseline_ms": forward * 1e3, "ratio": ratio}


class Writer:
    """A text of N equal rows in the cache, to which tokens are added one by one."""

    def __init__(self, model: AssembledModel, rows: int, length: int):
        self._rows, self._count = rows, 0
        self._session: TextSession = open_session(model, range(rows), None, None)
        self._read(length)

    @torch.inference_mode()
    def token(self) -> None:
        """Read the newest token, and say what may follow."""
        self._read(1)

    @torch.inference_mode()
    def _read(self, length: int) -> None:
        tokens = torch.zeros((self._rows, length), dtype=torch.int64)
        self._session.read(tokens, torch.full((self._rows,), length))
        self._session.probabilities(self._count)
        self._count += 1


def writing(models: Sequence[AssembledModel], rows: int, pairs: int) -> dict[str, dict[str, float]]:
    """Milliseconds a token of chain and baseline, early and late in the text, and tokens a second."""
    chain, whole = models
    both = [Writer(model, rows, EARLY - 1) for model in models]
    _, _, ratio = by_turns(both[0].token, both[1].token, pairs)
    found: dict[str, dict[str, float]] = {"both": {"rows": rows, "chain_over_baseline": ratio}}
    for name, model in (("chain", chain), ("baseline", whole)):
        # The tokens timed stand evenly around the two numbers.
        early = Writer(model, rows, max(1, EARLY - 1 - pairs // 2))
        late = Writer(model, rows, LATE - 1 - pairs // 2)
        late_seconds, early_seconds, growth = by_turns(late.token, early.token, pairs)
        anew = seconds(partial(Writer, model, rows, LATE // 2))  # a token in the middle of the text
        found[name] = {
            "early_ms": early_seconds * 1e3,
            "late_ms": late_seconds * 1e3,
            "late_over_early": growth,
            "tokens_per_second": 2 * rows / (early_seconds + late_seconds),
            "tokens_per_second_without_cache": rows / anew,
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs timed (default: 20)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"threads": options.threads, "blocks": BLOCKS}
    result["images"] = images(128, options.pairs)
    models = language_models()
    result["windows"] = windows(models, max(3, options.pairs // 4))
    result["writing"] = [writing(models, rows, options.pairs) for rows in (1, 8)]
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.threads} thread(s); {BLOCKS} blocks, and the end-to-end network of the same 12 layers\n")
    print("| | chain, ms | baseline, ms | chain / baseline |\n|---|---|---|---|")
    for name, found in (
        ("128 images, ViT of width 128", result["images"]),
        (f"a window of {LM['length']} tokens, LM of width {LM['width']}", result["windows"]),
    ):
        print(f"| {name} | {found['chain_ms']:.0f} | {found['baseline_ms']:.0f} | {found['ratio']:.2f} |")
    print(f"\n| writing | token {EARLY}, ms | token {LATE}, ms | ratio | tokens/s | without cache | / baseline |")
    print("|---|---|---|---|---|---|---|")
    for found in result["writing"]:
        rows = found["both"]["rows"]
        for name in ("chain", "baseline"):
            line = found[name]
            over = f"{found['both']['chain_over_baseline']:.2f}" if name == "chain" else ""
            print(
                f"| {name}, {rows} text{'s' if rows > 1 else ''} | {line['early_ms']:.1f} | {line['late_ms']:.1f} |"
                f" {line['late_over_early']:.2f} | {line['tokens_per_second']:.1f} |"
                f" {line['tokens_per_second_without_cache']:.2f} | {over} |"
            )


if __name__ == "__main__":
    main()
