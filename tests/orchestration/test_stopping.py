from __future__ import annotations

import os
import signal
import threading

import pytest

from dbtrain.orchestration.stopping import StopToken, stop_on_signals


def test_listeners_hear_one_request() -> None:
    token, heard = StopToken(), []
    token.listen(lambda: heard.append(1))
    token.request()
    token.request()
    assert token.requested
    assert heard == [1]


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    token = StopToken()
    token.request()  # a stop from elsewhere does not count as a signal
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals(token):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_the_handlers_alone() -> None:
    seen = []

    def body() -> None:
        with stop_on_signals(StopToken()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
