"""Fewer workers than blocks that take turns: the same bytes, and a model long before the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_journal import events

from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.loading import load_model
from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.inference.runs import model_of
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory

MakeConfig = Callable[..., RunConfig]
DigestOf = Callable[[Path], str]


class StopWhen:
    """Asks for a stop as soon as `condition` holds."""

    def __init__(self, token: StopToken, condition: Callable[[Snapshot], bool]):
        self._token, self._condition = token, condition

    def update(self, snapshot: Snapshot) -> None:
        if self._condition(snapshot):
            self._token.request()


def test_blocks_take_turns_and_give_the_same_bytes(
    tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf
) -> None:
    assert train_run(make_config(), tmp_path / "plain").ok
    # Slices end with the next checkpoint that is due.
    assert train_run(make_config(resources={"interleave": 12}), tmp_path / "turns").ok
    starts = events(tmp_path / "turns", "block_starting")
    assert [(line["block"], line.get("until")) for line in starts] == [
        (0, 12), (1, 12), (2, 12), (0, 24), (1, 24), (2, None),
    ]  # fmt: skip
    assert {line["restarts"] for line in starts} == {0}
    assert [line["step"] for line in events(tmp_path / "turns", "block_paused")] == [20, 20, 20]
    assert digest_of(tmp_path / "turns") == digest_of(tmp_path / "plain")


def test_a_model_of_unfinished_blocks(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(resources={"interleave": 12})
    token = StopToken()
    stop = StopWhen(token, lambda snapshot: all(block.step >= 12 for block in snapshot.blocks))
    assert train_run(config, tmp_path, stop=token, watch=stop).stopped
    run = RunDirectory.open(tmp_path)
    with pytest.raises(UserError, match="--partial"):
        assemble(run)
    made = assemble(run, partial=True)
    assert made.partial
    assert all(12 <= step < 30 for step in made.steps)
    assert load_model(str(tmp_path)).steps == made.steps
    assert "of 30 steps" in (tmp_path / "model/README.md").read_text()
    assert model_of(run).sha256 == made.sha256  # it stays while the run is unfinished
    assert json.loads((tmp_path / "model/config.json").read_text())["steps"] == list(made.steps)

    assert train_run(config, tmp_path).ok
    finished = model_of(run)
    assert not finished.partial
    assert finished.sha256 == assemble(run).sha256 != made.sha256


def test_a_block_that_has_nothing_yet(tmp_path: Path, make_config: MakeConfig) -> None:
    token = StopToken()
    stop = StopWhen(token, lambda snapshot: snapshot.blocks[0].state is BlockState.FINISHED)
    assert train_run(make_config(), tmp_path, stop=token, watch=stop).stopped
    with pytest.raises(UserError, match=r"block [12] has no checkpoint yet"):
        assemble(RunDirectory.open(tmp_path), partial=True)
    assert not (tmp_path / "model").exists()
