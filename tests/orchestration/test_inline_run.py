from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_journal import events

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.lock import driver_lock
from dbtrain.orchestration.run import RunResult, train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import Storage

MakeConfig = Callable[..., RunConfig]
DigestOf = Callable[[Path], str]


class At:
    """Does something once, when a block has reached a step."""

    def __init__(self, block: int, step: int, action: Callable[[], None]):
        self.block, self.step, self.action = block, step, action
        self.done = False

    def update(self, snapshot: Snapshot) -> None:
        block = snapshot.blocks[self.block]
        if not self.done and block.state is BlockState.RUNNING and block.step >= self.step:
            self.done = True
            self.action()


def states(result: RunResult) -> list[str]:
    return [block.state.value for block in result.blocks]


def damage_checkpoints(path: Path, block: int, newest_only: bool = False) -> None:
    files = sorted((path / f"blocks/{block:02d}/checkpoints").glob("step-*/model.safetensors*"))
    for file in files[-1:] if newest_only else files:
        file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig, digest_of: DigestOf) -> str:
    path = tmp_path_factory.mktemp("undisturbed")
    assert train_run(make_config(), path).ok
    return digest_of(path)


def test_a_run_trains_every_block_and_tells_it(tmp_path: Path, make_config: MakeConfig) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    result = train_run(make_config(), tmp_path, order=[2, 0, 1])
    assert result.ok
    assert result.to_json()["blocks"][1] == {
        "index": 1,
        "state": "finished",
        "step": 30,
        "restarts": 0,
        "reason": None,
    }
    assert torch.get_num_threads() == before + 2
    torch.set_num_threads(before)
    assert [line["block"] for line in events(tmp_path, "block_starting")] == [2, 0, 1]
    running = events(tmp_path, "block_running")[0]
    assert (running["pid"], running["attempt"], running["device"]) == (os.getpid(), 1, "cpu")
    assert events(tmp_path, "run_ended")[-1]["blocks"] == {"0": "finished", "1": "finished", "2": "finished"}
    assert RunDirectory.open(tmp_path).block(0).metrics()[-1]["step"] == 30


def test_the_end_to_end_baseline_is_a_run_of_one_block(tmp_path: Path, make_config: MakeConfig) -> None:
    assert len(train_run(make_config(), tmp_path, kind="end_to_end").blocks) == 1


def test_averaged_stems_need_blocks_that_train_at_the_same_time(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(blocks={"stem": "averaged", "average_every": 5})
    with pytest.raises(UserError, match=r"blocks\.stem = 'averaged'.*--backend ray"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train_run(config, tmp_path / "run", kind="end_to_end").ok


def test_a_finished_run_is_left_alone(tmp_path: Path, make_config: MakeConfig) -> None:
    train_run(make_config(), tmp_path)
    events = RunDirectory.open(tmp_path).events()
    seen: list[Snapshot] = []

    class Watch:
        def update(self, snapshot: Snapshot) -> None:
            seen.append(snapshot)

    result = train_run(make_config(), tmp_path, watch=Watch())
    assert result.ok
    assert [block.state for block in seen[-1].blocks] == [BlockState.FINISHED] * 3
    assert RunDirectory.open(tmp_path).events() == events


def test_stop_and_start_again_give_the_same_bytes(
    tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf, undisturbed: str
) -> None:
    stop = StopToken()
    result = train_run(make_config(), tmp_path, order=[1, 0, 2], stop=stop, watch=At(1, 5, stop.request))
    assert states(result) == ["stopped"] * 3
    assert result.stopped
    assert not result.ok
    assert 5 <= result.blocks[1].step < 30

    result = train_run(make_config(), tmp_path, order=[1, 0, 2])
    assert result.ok
    assert [line["attempt"] for line in events(tmp_path, "block_starting") if line["block"] == 1] == [1, 2]
    assert digest_of(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run(tmp_path: Path, make_config: MakeConfig, number: signal.Signals) -> None:
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    result = train_run(make_config(), tmp_path, watch=At(0, 10, lambda: os.kill(os.getpid(), number)))
    assert states(result) == ["stopped"] * 3
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_signal_leaves_at_once_and_the_run_can_go_on(
    tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf, undisturbed: str
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_run(make_config(), tmp_path, watch=At(0, 10, twice))
    assert events(tmp_path, "run_interrupted")
    assert train_run(make_config(), tmp_path).ok
    assert digest_of(tmp_path) == undisturbed


def test_a_block_whose_code_fails_is_given_up_and_the_others_go_on(tmp_path: Path, make_config: MakeConfig) -> None:
    stop = StopToken()
    train_run(make_config(), tmp_path, stop=stop, watch=At(0, 20, stop.request))
    damage_checkpoints(tmp_path, 0)
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        result = train_run(make_config(), tmp_path)
    assert states(result) == ["failed", "finished", "finished"]
    assert result.blocks[0].restarts == 1
    assert "all checkpoints of block 0 are damaged" in str(result.blocks[0].reason)
    failed = events(tmp_path, "block_failed")[0]
    assert failed["reason"] == result.blocks[0].reason
    assert "Traceback" in failed["traceback"]
    assert not result.stopped


def test_a_finished_block_with_a_damaged_checkpoint_is_trained_from_the_one_before(
    tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf, undisturbed: str
) -> None:
    train_run(make_config(), tmp_path)
    damage_checkpoints(tmp_path, 1, newest_only=True)
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        result = train_run(make_config(), tmp_path)
    assert result.ok
    assert [line["block"] for line in events(tmp_path, "block_starting")] == [0, 1, 2, 1]
    assert digest_of(tmp_path) == undisturbed


def test_an_attempt_that_was_started_and_never_claimed_is_not_given_out_again(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    stop = StopToken()
    stop.request()  # leaves a run in which nothing has happened
    assert states(train_run(make_config(), tmp_path, stop=stop)) == ["stopped"] * 3
    RunDirectory.open(tmp_path).journal({"event": "block_starting", "block": 1, "attempt": 7})
    train_run(make_config(), tmp_path)
    assert RunDirectory.open(tmp_path).block(1).current_attempt() == 8


def test_two_drivers_of_one_run_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    with (
        driver_lock(Storage.open(tmp_path)),
        pytest.raises(UserError, match=f"is being trained by process {os.getpid()}"),
    ):
        train_run(make_config(), tmp_path)
    assert train_run(make_config(), tmp_path).ok


def test_a_refused_driver_leaves_the_configuration_of_the_one_at_work(tmp_path: Path, make_config: MakeConfig) -> None:
    stop = StopToken()
    stop.request()
    train_run(make_config(), tmp_path, stop=stop)
    before = (tmp_path / "config.yaml").read_bytes()
    with driver_lock(Storage.open(tmp_path)), pytest.raises(UserError, match="is being trained"):
        train_run(make_config(checkpoints={"every": 7}), tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == before
    train_run(make_config(checkpoints={"every": 7}), tmp_path, stop=stop)
    assert RunDirectory.open(tmp_path).config.checkpoints.every == 7


def test_the_run_finds_its_data_from_any_working_directory(
    tmp_path: Path, make_config: MakeConfig, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits.parent)
    stop = StopToken()
    config = make_config(data={"path": "digits"})
    train_run(config, tmp_path / "run", stop=stop, watch=At(0, 5, stop.request))
    assert RunDirectory.open(tmp_path / "run").config.data.path == str(digits)


def test_a_users_mistake_leaves_nothing_behind(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"model\.num_classes"):
        train_run(make_config(model={"num_classes": 11}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
