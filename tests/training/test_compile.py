"""`training.compile` with a backend that leaves the graphs as they are: what is compiled, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_families import MODELS
from small_runs import start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.plan import Kind

FamilyConfig = Callable[..., RunConfig]
STEPS = 6


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, int]]]:
    """Those of torch.compile, from zero on."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks", "end_to_end"])
@pytest.mark.parametrize("family", MODELS)
def test_one_graph_and_no_other_in_later_steps(
    family: str, kind: Kind, family_config: FamilyConfig, tmp_path: Path, counters: dict[str, dict[str, int]]
) -> None:
    config = family_config(family, training={"steps": STEPS, "compile": True})
    train_block(start_run(config, tmp_path, kind))
    assert not counters["graph_break"]
    # The end-to-end network whose depth is drawn at each step compiles its layers: with gradients, and without.
    assert counters["stats"]["unique_graphs"] in ((1, 2) if (family, kind) == ("recurrent_lm", "end_to_end") else (1,))
