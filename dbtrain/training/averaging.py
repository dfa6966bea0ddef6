"""Averaged stems: every few steps a block sets its stem to the mean over the blocks that train at the moment.

A meeting (`dbtrain.training.ledger`) is agreed upon in the run's store, then its members sum their stems in a gloo
group of their own, which they keep while they stay the same. A stem on a GPU goes through host memory: NCCL ends the
process when a peer is gone, and cannot join two workers that share a GPU. Optimiser state and averaged weights (EMA)
stay each block's own.

A worker loses at most twice the patience in one meeting: once to wait for the others, once for the sum. Whatever goes
wrong in there, it keeps its own stem and trains on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import AllreduceOptions, PrefixStore, ProcessGroupGloo, Store
from torch.distributed import DistError

from dbtrain.config import BlocksConfig
from dbtrain.training.ledger import NO_MEETING_YET, Arrival, Decision, Ledger
from dbtrain.training.meeting import choose_interface, join, live_blocks
from dbtrain.training.stem import stem_of

_KEY = "stems"
_FIRST_POLL, _LAST_POLL = 0.001, 0.05
"""Seconds between two looks at the ledger: blocks of equal speed come within milliseconds, a straggler in seconds."""

_log = logging.getLogger(__name__)


class StemAverager:
    """One block's part in the meetings of its run."""

    def __init__(self, blocks: BlocksConfig, index: int, attempt: int, address: str, module: nn.Module):
        """`address` is the store's, as host:port; nothing is sent before the first meeting."""
        self._every, self._patience = blocks.average_every, blocks.average_patience
        self._index, self._attempt, self._address = index, attempt, address
        self._stem = stem_of(module)
        self._delegate = self._new_delegate()
        self._past: list[dict[str, Any]] = []

    def after_step(self, step: int, end: int, total: int, stopping: Callable[[], bool]) -> None:
        """Meet the other blocks if it is time.

        The last step of a training is followed by no meeting: a block's layers are used with the stem they were
        trained with.

        Args:
            step: finished optimiser steps.
            end: step at which this worker leaves.
            total: step at which training is over.
            stopping: whether to leave at once rather than wait; asked again and again, from another thread.
        """
        if step % self._every or step >= total:
            return
        returns = step + self._every <= min(end, total - 1)
        stem = _flatten(self._stem)
        if not stem.isfinite().all():
            return  # it would spread to all blocks
        delegate = self._delegate
        try:
            # Calls of the store know no time-out when the network swallows what is sent.
            decision = _bounded(lambda: delegate.meet(stem, returns, stopping), 2 * self._patience)
        except (DistError, _GroupFailed, OSError) as error:  # of time, of routes, of names
            reason = str(error).partition("\n")[0]
            _log.warning("block %d keeps its own stem at step %d: %s", self._index, step, reason)
            delegate.abandoned = True
            self._delegate = self._new_delegate()
            self._past.append({"meeting": delegate.meeting, "step": step, "failed": reason})
            return
        if decision is not None:
            _unflatten(stem.div_(len(decision.members)), self._stem)
            blocks = [block for block, _ in decision.members]
            self._past.append({"meeting": delegate.meeting, "step": step, "blocks": blocks})

    def report(self) -> dict[str, Any]:
        """For the block's metrics: the meetings since the last report, each with its number, step and blocks."""
        past, self._past = self._past, []
        return {"meetings": past}

    def _new_delegate(self) -> _Delegate:
        return _Delegate(self._index, self._attempt, self._address, self._patience)


class _GroupFailed(Exception):
    """A member died or did not answer while stems were summed."""


class _Delegate:
    """Talks to the others, with the store and the group that it holds; replaced by a new one after any failure."""

    def __init__(self, index: int, attempt: int, address: str, patience: float):
        self._index, self._attempt, self._address, self._patience = index, attempt, address, patience
        self._store: Store | None = None
        self._group: ProcessGroupGloo | None = None
        self._group_name: int | None = None
        self.meeting: int | None = None
        """Number of the last meeting it came to."""
        self.abandoned = False
        """Set when nobody waits for it any more: it must not promise a stem that nobody will bring."""

    def meet(self, stem: Tensor, returns: bool, stopping: Callable[[], bool]) -> Decision | None:
        """Come to the open meeting, and replace `stem` by its sum over the members.

        Returns:
            The decision; None where this block is not part of it and `stem` is what it was.

        Raises:
            DistError: the store is gone or out of reach.
            _GroupFailed: a member is.
        """
        if self._store is None:
            choose_interface(self._address)
            self._store = join(self._address, self._patience)
        decision = self._gather(self._store, returns, stopping)
        if decision is not None:
            try:
                self._sum(self._store, stem, decision)
            except RuntimeError as error:  # gloo has no type of its own
                raise _GroupFailed(str(error)) from error
        return decision

    def _gather(self, store: Store, returns: bool, stopping: Callable[[], bool]) -> Decision | None:
        """Arrive, wait, and learn who takes part; None where this block does not."""
        me = (self._index, self._attempt)
        arrival = Arrival(self._attempt, self._group_name, returns)
        while True:
            text, ledger = self._read(store)
            # The driver has given up on this worker, and another may have its block.
            if live_blocks(store).get(self._index) != self._attempt:
                return None
            if _swap(store, text, ledger.with_arrival(self._index, arrival)):
                break
        self.meeting = ledger.meeting
        deadline, pause = time.monotonic() + self._patience, _FIRST_POLL
        while True:
            text, ledger = self._read(store)
            if ledger.meeting != self.meeting:
                decision = ledger.decision if ledger.meeting == self.meeting + 1 else None
                return decision if decision is not None and me in decision.members else None
            live = live_blocks(store)
            if stopping():
                if _swap(store, text, ledger.without(self._index)):
                    return None
            elif ledger.complete(live) or time.monotonic() >= deadline:
                _swap(store, text, ledger.closed(live))
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, _LAST_POLL)

    def _sum(self, store: Store, stem: Tensor, decision: Decision) -> None:
        deadline = time.monotonic() + self._patience
        if self._group_name != decision.group:
            self._group, self._group_name = None, None
        if len(decision.members) == 1:
            return
        if self._group is None:
            rank = decision.members.index((self._index, self._attempt))
            place = PrefixStore(f"{_KEY}/{decision.group}", store)
            patience = timedelta(seconds=self._patience)
            self._group = ProcessGroupGloo(place, rank, len(decision.members), patience)
            self._group_name = decision.group
        options = AllreduceOptions()
        options.timeout = timedelta(seconds=max(0.1, deadline - time.monotonic()))
        self._group.allreduce([stem], options).wait()  # type: ignore[attr-defined]

    def _read(self, store: Store) -> tuple[str, Ledger]:
        if self.abandoned:
            raise TimeoutError("nobody waits any more")
        return read_ledger(store)


def read_ledger(store: Store) -> tuple[str, Ledger]:
    """The ledger in the store, as it stands there and as a value."""
    text = store.compare_set(_KEY, "", NO_MEETING_YET.to_json()).decode()  # begins it where nobody has
    return text, Ledger.from_json(text)


def _swap(store: Store, before: str, after: Ledger) -> bool:
    """Whether nobody else has changed the ledger in between."""
    wanted = after.to_json()
    return store.compare_set(_KEY, before, wanted).decode() == wanted


def _bounded(call: Callable[[], Decision | None], seconds: float) -> Decision | None:
    """What `call` returns or raises, from a thread that is left to itself after so many seconds."""
    result: list[Decision | None] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="stems", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"the run's store or a group has not answered for {seconds:g} s")
    if errors:
        raise errors[0]
    return result[0]


def _flatten(stem: dict[str, nn.Parameter]) -> Tensor:
    """All values in one vector on the CPU, a copy."""
    return torch.cat([value.detach().flatten().cpu() for value in stem.values()])


@torch.no_grad()
def _unflatten(values: Tensor, stem: dict[str, nn.Parameter]) -> None:
    begin = 0
    for value in stem.values():
        end = begin + value.numel()
        value.copy_(values[begin:end].view_as(value))
        begin = end
