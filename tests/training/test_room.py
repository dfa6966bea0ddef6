"""A full disk is waited for, and the waiting can be ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from small_disks import fill, resize
from small_runs import newest_files, start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.errors import NoRoom, UserError
from dbtrain.run_directory import BlockDirectory, RunDirectory, StaleAttempt
from dbtrain.training import room as room_module
from dbtrain.training.checkpoint import checkpoint_steps
from dbtrain.training.metrics import MetricsLog
from dbtrain.training.room import Room
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]


class _Disk:
    """Finds no room the first few times."""

    def __init__(self, failures: int, error: UserError | None = None):
        self._left = failures
        self._error = NoRoom("cannot write there: No space left on device") if error is None else error
        self.tries = 0

    def write(self) -> None:
        self.tries += 1
        self._left -= 1
        if self._left >= 0:
            raise self._error


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(room_module, "LONGEST_PAUSE", 0.05)


def test_it_tries_until_there_is_room_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    room, disk = Room(), _Disk(failures=5)
    room.write(disk.write)
    assert (disk.tries, room.trouble) == (6, None)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "No space left on device; waiting for room (free some space" in record.getMessage()


def test_other_errors_are_not_waited_for() -> None:
    disk = _Disk(1, UserError("cannot write there: Read-only file system"))
    with pytest.raises(UserError, match="Read-only"):
        Room().write(disk.write)
    assert disk.tries == 1


def test_giving_up_ends_the_waiting() -> None:
    room, disk = Room(), _Disk(failures=10**9)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            room.write(disk.write)
        except NoRoom as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while room.trouble is None:
        waiting.join(0.01)
        assert waiting.is_alive()
    room.give_up()
    waiting.join(30)
    assert len(raised) == 1
    tries = disk.tries
    with pytest.raises(NoRoom):
        room.write(disk.write)
    assert disk.tries == tries + 1


class _FullBlock(BlockDirectory):
    """Has no room for metrics now and then."""

    full = False

    def log_metrics(self, values: object) -> None:
        if self.full:
            raise NoRoom("cannot write metrics.jsonl: No space left on device")
        super().log_metrics(values)  # type: ignore[arg-type]


def _tell(log: MetricsLog, step: int) -> None:
    log.tell(
        step=step,
        samples=0,
        loss=1.0,
        grad_norm=1.0,
        lr=1.0,
        samples_per_second=1.0,
        skipped=0,
        checkpoint_step=0,
        peak_memory=1,
        stem={},
    )


def test_metrics_are_held_back_while_the_disk_is_full(block: BlockDirectory, caplog: pytest.LogCaptureFixture) -> None:
    full = _FullBlock(block.storage, 0)
    log = MetricsLog(full, attempt=1)
    for step, is_full in ((1, False), (2, True), (3, True), (4, False), (5, True)):
        full.full = is_full
        _tell(log, step)
    assert [line["step"] for line in block.metrics()] == [1, 2, 3, 4]
    log.close()
    assert "no room for the last 1 lines" in caplog.text


def test_an_older_attempt_tells_nothing(block: BlockDirectory) -> None:
    log = MetricsLog(block, attempt=1)
    block.claim(1)
    _tell(log, 1)
    block.claim(2)
    with pytest.raises(StaleAttempt):
        _tell(log, 2)
    assert [line["step"] for line in block.metrics()] == [1]


@pytest.fixture
def run_on(small_disk: Path, small_config: SmallConfig) -> RunDirectory:
    resize(small_disk, "4M")
    return start_run(small_config(training={"steps": 40}, checkpoints={"every": 10}), small_disk / "run")


@pytest.fixture
def waiting(run_on: RunDirectory, small_disk: Path) -> Iterator[tuple[BlockTrainer, Iterator[object], Path]]:
    """A trainer that has checkpoint 10 and finds no room for the next one, its reports, and what fills the disk."""
    with closing(BlockTrainer(run_on, 0, 1)) as trainer:
        reports = trainer.train()
        while next(reports).step < 10:
            pass
        trainer._store.wait()
        filler = fill(small_disk)
        for report in reports:
            if report.trouble is not None:
                assert "No space left on device" in report.trouble
                assert str(small_disk) in report.trouble
                break
        assert trainer.step == 30  # the next save waits for the one of step 20
        yield trainer, reports, filler


def test_training_goes_on_when_there_is_room(
    waiting: tuple[BlockTrainer, Iterator[object], Path],
    run_on: RunDirectory,
    small_config: SmallConfig,
    tmp_path: Path,
) -> None:
    trainer, reports, filler = waiting
    assert checkpoint_steps(run_on.block(0)) == [10]
    filler.unlink()
    assert list(reports)[-1].done  # type: ignore[attr-defined]
    assert trainer.trouble is None
    undisturbed = start_run(run_on.config, tmp_path / "undisturbed")
    train_block(undisturbed)
    assert newest_files(run_on) == newest_files(undisturbed)
    assert [line["step"] for line in run_on.block(0).metrics()] == [10, 20, 30, 40]
    steps = [line["checkpoint_step"] for line in run_on.block(0).metrics()]
    assert steps == sorted(steps)


def test_a_stop_ends_the_waiting(
    waiting: tuple[BlockTrainer, Iterator[object], Path], run_on: RunDirectory, small_disk: Path
) -> None:
    trainer, reports, filler = waiting
    trainer.request_stop()
    last = list(reports)[-1]
    assert (last.step, last.checkpoint_step, last.done) == (10, 10, False)  # type: ignore[attr-defined]
    assert not list(small_disk.rglob(".tmp-*"))
    filler.unlink()
    reports = train_block(run_on, attempt=2)
    assert (reports[0].step, reports[-1].done) == (10, True)


def test_closing_does_not_wait(waiting: tuple[BlockTrainer, Iterator[object], Path]) -> None:
    with pytest.raises(NoRoom):
        waiting[0].close()


def test_a_worker_that_starts_on_a_full_disk_waits_to_claim_its_block(run_on: RunDirectory, small_disk: Path) -> None:
    filler = fill(small_disk)
    room, built = Room(), []

    def build() -> None:
        with closing(BlockTrainer(run_on, 0, 1, room=room)) as trainer:
            built.append(trainer.step)

    builder = threading.Thread(target=build)
    builder.start()
    while room.trouble is None:
        builder.join(0.01)
        assert builder.is_alive()
    filler.unlink()
    builder.join(60)
    assert built == [0]
