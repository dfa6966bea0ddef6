"""One block's part in meetings that go wrong; the others are threads here, or nobody."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from small_runs import start_run
from torch import Tensor, nn
from torch.distributed import TCPStore

from dbtrain.config import BlocksConfig, RunConfig
from dbtrain.orchestration.session import BlockSession, Outcome
from dbtrain.training.averaging import StemAverager, read_ledger
from dbtrain.training.ledger import Arrival
from dbtrain.training.meeting import MeetingPlace
from dbtrain.training.seat import Seat

EVERY, TOTAL = 10, 1000


@pytest.fixture
def place() -> MeetingPlace:
    place = MeetingPlace("127.0.0.1")
    place.tell_live({0: 1, 1: 1})
    return place


class Block:
    """A block with a stem of one number, and its averager."""

    def __init__(
        self, place: MeetingPlace | _Wire, index: int, value: float, *, attempt: int = 1, patience: float = 60.0
    ):
        self.module = nn.ModuleDict({"head": nn.Linear(1, 1, bias=False), "layers": nn.ModuleList([nn.Linear(1, 1)])})
        self.stem: Tensor = self.module.get_parameter("head.weight").data.fill_(value)
        config = BlocksConfig(stem="averaged", average_every=EVERY, average_patience=patience)
        self.averager = StemAverager(config, index, attempt, place.address, self.module)

    def meet(self, step: int, *, end: int = TOTAL) -> None:
        self.averager.after_step(step, end, TOTAL, lambda: False)

    def told(self) -> list[object]:
        return [line.get("blocks", "failed") for line in self.averager.report()["meetings"]]


class _Wire:
    """A port that leads to the store; while it is cut, connections stay open and nothing comes through."""

    def __init__(self, port: int):
        self.cut = threading.Event()
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, far = self._server.accept()[0], socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self.cut.is_set():
                    sink.sendall(data)

    def __enter__(self) -> _Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        for end in self._ends:
            end.close()


def _together(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_only_the_stem_and_only_when_it_is_time(place: MeetingPlace) -> None:
    a, b = Block(place, 0, 1.0), Block(place, 1, 4.0)
    layers = [block.module.get_parameter("layers.0.weight").detach().clone() for block in (a, b)]
    for step in (1, 9, 11, TOTAL):
        a.meet(step)  # would wait for ever
    _together(lambda: a.meet(10), lambda: b.meet(30))
    assert (a.stem.item(), b.stem.item()) == (2.5, 2.5)
    for block, before in zip((a, b), layers, strict=True):
        assert torch.equal(block.module.get_parameter("layers.0.weight"), before)
    assert a.averager.report() == {"meetings": [{"meeting": 0, "step": 10, "blocks": [0, 1]}]}
    assert b.averager.report() == {"meetings": [{"meeting": 0, "step": 30, "blocks": [0, 1]}]}
    assert b.told() == []


def test_a_member_that_never_joins_the_sum_fails_that_meeting_alone(place: MeetingPlace) -> None:
    a = Block(place, 0, 1.0, patience=3.0)
    text, ledger = read_ledger(place.store)
    place.store.compare_set("stems", text, ledger.with_arrival(1, Arrival(1, None, True)).to_json())  # and is gone
    a.meet(10)
    assert (a.stem.item(), a.told()) == (1.0, ["failed"])
    b = Block(place, 1, 3.0)
    _together(lambda: a.meet(20), lambda: b.meet(10))
    assert (a.stem.item(), b.stem.item(), a.told()) == (2.0, 2.0, [[0, 1]])


def test_a_late_block_goes_to_the_next_meeting(place: MeetingPlace) -> None:
    hasty = Block(place, 0, 1.0, patience=0.5)
    hasty.meet(10)
    assert (hasty.stem.item(), hasty.told()) == (1.0, [[0]])
    a, b = Block(place, 0, 1.0), Block(place, 1, 3.0)

    def meet_after_b() -> None:
        while 1 not in read_ledger(place.store)[1].arrived:
            time.sleep(0.01)
        a.meet(20)

    _together(meet_after_b, lambda: b.meet(10))
    assert (a.stem.item(), b.stem.item()) == (2.0, 2.0)
    assert b.averager.report() == {"meetings": [{"meeting": 1, "step": 10, "blocks": [0, 1]}]}


def test_nobody_waits_for_a_block_that_has_come_for_the_last_time(place: MeetingPlace) -> None:
    a, b = Block(place, 0, 1.0), Block(place, 1, 3.0)
    _together(lambda: a.meet(10), lambda: b.meet(10, end=15))  # its time slice ends before step 20
    a.meet(20)
    assert a.told() == [[0, 1], [0]]


def test_a_worker_that_was_given_up_takes_no_part(place: MeetingPlace) -> None:
    place.tell_live({0: 2, 1: 1})
    old, new, b = Block(place, 0, 9.0), Block(place, 0, 1.0, attempt=2), Block(place, 1, 3.0)
    old.meet(10)
    _together(lambda: new.meet(10), lambda: b.meet(10))
    assert (old.stem.item(), new.stem.item(), b.stem.item()) == (9.0, 2.0, 2.0)
    assert old.told() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stem_that_is_not_finite_spreads_to_nobody(place: MeetingPlace, value: float) -> None:
    ill, well = Block(place, 0, value), Block(place, 1, 3.0, patience=0.5)
    ill.meet(10)
    well.meet(10)
    assert (well.stem.item(), ill.told(), well.told()) == (3.0, [], [[1]])


def test_a_store_that_is_gone_costs_a_meeting_and_no_more() -> None:
    place = MeetingPlace("127.0.0.1")
    place.tell_live({0: 1})
    port = place.store.port
    a = Block(place, 0, 1.0, patience=2.0)
    a.meet(10)
    assert a.told() == [[0]]
    del place
    a.meet(20)
    a.meet(30)
    assert (a.stem.item(), a.told()) == (1.0, ["failed", "failed"])
    back = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    back.set("live", "[[0, 1]]")
    a.meet(40)
    assert a.told() == [[0]]


def test_a_host_that_nobody_knows_costs_a_meeting_and_no_more(place: MeetingPlace) -> None:
    place.address = "nowhere.invalid:1"
    a = Block(place, 0, 1.0, patience=2.0)
    a.meet(10)
    assert (a.stem.item(), a.told()) == (1.0, ["failed"])


def test_a_network_that_swallows_all_costs_a_meeting_and_no_more(place: MeetingPlace) -> None:
    place.tell_live({0: 1})
    with _Wire(place.store.port) as wire:
        a = Block(wire, 0, 1.0, patience=2.0)
        a.meet(10)
        assert a.told() == [[0]]
        wire.cut.set()
        a.meet(20)
        assert a.told() == ["failed"]
        wire.cut.clear()
        a.meet(30)
        assert a.told() == [[0]]


def test_a_waiting_worker_answers_and_stops_when_asked(
    place: MeetingPlace, small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    blocks = {"count": 2, "stem": "averaged", "average_every": 5, "average_patience": 600.0}
    run = start_run(small_config(blocks=blocks), tmp_path)
    session = BlockSession(run.uri, 0, 1, Seat(meeting=place.address))
    outcomes: list[Outcome] = []

    def train() -> None:
        while not isinstance(report := session.advance(), Outcome):
            pass
        outcomes.append(report)

    thread = threading.Thread(target=train)
    thread.start()
    deadline = time.monotonic() + 60
    while 0 not in read_ledger(place.store)[1].arrived:  # it waits for block 1, which never comes
        assert time.monotonic() < deadline
        assert thread.is_alive(), outcomes
        time.sleep(0.02)
    progress = session.progress()
    assert progress is not None
    assert progress.step == 5
    session.request_stop()
    thread.join(60)
    assert [(outcome.kind, outcome.step) for outcome in outcomes] == [("stopped", 5)]
    assert 0 not in read_ledger(place.store)[1].arrived
