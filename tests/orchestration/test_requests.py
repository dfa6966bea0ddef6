"""What is asked of a live run through its directory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from feeding import feed, fresh, started
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.orchestration.events import Node, Tick, WorkerFinished
from dbtrain.orchestration.lock import driver_lock
from dbtrain.orchestration.requests import (
    ANSWER,
    FOLDER,
    Answer,
    ask,
    collect,
    named_blocks,
    new_request,
    why_not_scale,
)
from dbtrain.orchestration.state import BlockState, BlockStatus, Policy, initial_state
from dbtrain.run_directory import RunDirectory

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path) -> RunDirectory:
    """A run directory in which nothing is trained yet."""
    return start_run(make_config(), tmp_path / "run")


def answer(run: RunDirectory, done: bool, reason: str | None = None) -> None:
    """What a driver does: take one request as soon as it is there, and answer it in the journal."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for request in collect(run.storage):
            line = {"event": ANSWER, "request": request.id, "kind": request.kind, "done": done}
            run.journal(line if reason is None else {**line, "reason": reason})
            return
        time.sleep(0.02)


@pytest.mark.parametrize(("done", "reason"), [(True, None), (False, "there is no block 9")])
def test_a_driver_at_work_answers(run: RunDirectory, done: bool, reason: str | None) -> None:
    with driver_lock(run.storage):
        run.journal({"event": ANSWER, "request": "of somebody else", "kind": "stop", "done": False, "reason": "no"})
        driver = threading.Thread(target=answer, args=(run, done, reason))
        driver.start()
        assert ask(run, new_request("scale", [9], 2), patience=60) == Answer(done, reason)
        driver.join()
    assert run.storage.list(FOLDER) == []


def test_nobody_at_work_is_told_at_once_and_nothing_is_left(run: RunDirectory) -> None:
    with pytest.raises(UserError, match="nobody is training this run") as caught:
        ask(run, new_request("stop"), patience=60)
    assert "dbtrain train" in str(caught.value)
    assert not run.storage.exists(FOLDER)


def test_a_driver_that_does_not_answer_is_not_waited_for_and_the_request_is_taken_back(run: RunDirectory) -> None:
    with driver_lock(run.storage), pytest.raises(UserError, match=r"not answered for 0\.3 s") as caught:
        ask(run, new_request("stop"), patience=0.3)
    assert run.uri in str(caught.value)
    assert collect(run.storage) == []


def test_a_driver_that_leaves_without_an_answer_is_noticed(run: RunDirectory) -> None:
    def leave() -> None:
        with driver_lock(run.storage):
            here.set()
            deadline = time.monotonic() + 60
            while not run.storage.exists(FOLDER) and time.monotonic() < deadline:
                time.sleep(0.02)

    here = threading.Event()
    driver = threading.Thread(target=leave)
    driver.start()
    assert here.wait(60)
    with pytest.raises(UserError, match="nobody is training this run"):
        ask(run, new_request("stop"), patience=60)
    driver.join()
    assert collect(run.storage) == []


def test_all_requests_are_collected_once(run: RunDirectory) -> None:
    asked = [new_request("stop"), new_request("scale", [0, 2], 2), new_request("stop")]
    for request in asked:
        write(run, request.id, f'{{"id": "{request.id}", "kind": "{request.kind}", "blocks": {list(request.blocks)},')
        path = Path(run.uri) / FOLDER / f"{request.id}.json"
        path.write_text(path.read_text() + f'"replicas": {request.replicas}}}')
    assert collect(run.storage) == sorted(asked, key=lambda request: request.id)
    assert collect(run.storage) == []


def write(run: RunDirectory, name: str, text: str) -> None:
    """A file in the folder of requests, as anybody may put it there."""
    run.storage.write_atomic(f"{FOLDER}/{name}.json", text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"id": "a", "kind": "sto',
        "[]",
        "7",
        '{"id": "a", "kind": "format", "blocks": [], "replicas": 0}',
        '{"id": "a", "kind": "scale", "blocks": 3, "replicas": 2}',
        '{"id": "a", "kind": "scale", "blocks": [0], "replicas": null}',
        '{"id": "a", "kind": "stop"}',
        "\\udcff\\x00",
    ],
)
def test_what_is_no_request_is_thrown_away_and_holds_up_no_other(run: RunDirectory, text: str) -> None:
    write(run, "a", text)
    write(run, "b", '{"id": "b", "kind": "stop", "blocks": [], "replicas": 0}')
    assert [(request.id, request.kind) for request in collect(run.storage)] == [("b", "stop")]
    assert run.storage.list(FOLDER) == []


def test_a_request_that_is_still_written_is_left_alone(run: RunDirectory) -> None:
    write(run, "a", "{}")
    (Path(run.uri) / FOLDER / ".b.json.tmp").write_text("{")
    assert collect(run.storage) == []
    assert run.storage.list(FOLDER) == [".b.json.tmp"]


def test_no_requests_no_folder(run: RunDirectory) -> None:
    assert collect(run.storage) == []


@pytest.mark.parametrize(
    ("blocks", "replicas", "reason"),
    [
        ([0], 2, None),
        ([0, 1], 2, "needs 2 more workers, and there is room for 1 of 3"),
        ([0], 3, "3 workers cannot share batches of 64 samples equally"),
        ([0], 4, "needs 3 more workers, and there is room for 1 of 3"),
        ([0], 0, "a block needs at least 1 worker, not 0"),
        ([0], -2, "a block needs at least 1 worker, not -2"),
        ([3], 2, "there is no block 3: the run has blocks 0 to 2"),
        ([-1], 2, "there is no block -1: the run has blocks 0 to 2"),
        ([2], 2, "block 2 is finished"),
        ([0], 1, None),
    ],
)
def test_why_a_block_is_not_scaled(
    make_config: MakeConfig, blocks: list[int], replicas: int, reason: str | None
) -> None:
    config = make_config(training={"batch_size": 64})
    state, _ = feed(fresh(3, slots=3), Tick(0.0), started(1.0, 0, 1), started(1.0, 1, 1), WorkerFinished(2.0, 2, 1, 9))
    assert why_not_scale(config, state, new_request("scale", blocks, replicas)) == reason


def test_accumulated_batches_are_shared_in_their_parts(make_config: MakeConfig) -> None:
    config = make_config(training={"batch_size": 64, "accumulate": 32})
    reason = why_not_scale(config, fresh(1, slots=9), new_request("scale", [0], 4))
    assert reason == "4 workers cannot share batches of 64 samples equally in 32 parts"


def test_a_block_that_waits_for_too_much_may_ask_for_less(make_config: MakeConfig) -> None:
    blocks = [BlockStatus(0, replicas=3), BlockStatus(1, replicas=4)]
    state, _ = feed(fresh(blocks, slots=4), Tick(0.0))
    config = make_config(training={"batch_size": 64})
    assert [block.seats for block in state.blocks] == [3, 0]
    assert why_not_scale(config, state, new_request("scale", [1], 2)) is None
    assert (
        why_not_scale(config, state, new_request("scale", [1], 8))
        == "needs 8 more workers, and there is room for 1 of 4"
    )


def test_storage_that_is_away_holds_no_requests() -> None:
    class Away:
        def list(self, rel: str) -> list[str]:
            raise OSError("the network is down")

    assert collect(Away()) == []  # type: ignore[arg-type]


def test_a_request_that_may_not_be_removed_is_still_heard(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    request = new_request("stop")
    run.storage.write_atomic(f"{FOLDER}/{request.id}.json", json.dumps(asdict(request)).encode())

    def refuse(rel: str) -> None:
        raise UserError("not permitted")

    monkeypatch.setattr(run.storage, "remove_tree", refuse)
    assert collect(run.storage) == [request]


def test_all_blocks_are_those_that_have_not_ended() -> None:
    blocks = [BlockStatus(0, state=BlockState.FINISHED), BlockStatus(1), BlockStatus(2)]
    state = initial_state(blocks, nodes=[Node("n", 8)], policy=Policy())
    assert named_blocks(state, new_request("scale", replicas=2)) == (1, 2)
    assert named_blocks(state, new_request("scale", [0], 2)) == (0,)
