"""What `dbtrain stop` and `dbtrain scale` ask of the driver of a live run: small files in the run directory.

Whoever sees the directory can ask, whatever network there is. The driver answers in the journal, with a line that
names the request.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.orchestration.lock import driver_at_work
from dbtrain.orchestration.state import ENDED, CoordinatorState
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import Storage

FOLDER = "requests"
ANSWER = "request_answered"
"""Name of the journal's line about a request."""
_POLL_SECONDS = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One request."""

    id: str
    kind: Literal["stop", "scale"]
    blocks: tuple[int, ...] = ()
    """For `scale`: which; none for all that have not ended."""
    replicas: int = 0
    """For `scale`: how many workers each."""


@dataclass(frozen=True)
class Answer:
    """What the driver made of a request."""

    done: bool
    reason: str | None
    """Why it was refused."""


def new_request(kind: Literal["stop", "scale"], blocks: Sequence[int] = (), replicas: int = 0) -> Request:
    """A request with an id of its own."""
    return Request(uuid.uuid4().hex[:12], kind, tuple(blocks), replicas)


def ask(run: RunDirectory, request: Request, patience: float) -> Answer:
    """Put the request into the run directory and wait for the driver's answer.

    Args:
        patience: seconds to wait for it.

    Raises:
        UserError: nobody trains the run, or its driver has not answered in time; the request is taken back.
    """
    nobody = UserError(
        "nobody is training this run", field="RUN", value=run.uri, mend="start it with `dbtrain train` on its directory"
    )
    if not driver_at_work(run.storage):
        raise nobody
    name = f"{FOLDER}/{request.id}.json"
    before = len(run.events())
    run.storage.write_atomic(name, (json.dumps(asdict(request)) + "\n").encode())
    deadline = time.monotonic() + patience
    try:
        while time.monotonic() < deadline:
            for line in run.events()[before:]:
                if line["event"] == ANSWER and line["request"] == request.id:
                    return Answer(line["done"], line.get("reason"))
            if not driver_at_work(run.storage):
                break
            time.sleep(_POLL_SECONDS)
    finally:
        run.storage.remove_tree(name)
    if not driver_at_work(run.storage):
        raise nobody
    raise UserError(
        f"the driver of this run has not answered for {patience:g} s", field="RUN", value=run.uri, mend="try again"
    )


def collect(storage: Storage) -> list[Request]:
    """Take all requests out of the run directory, oldest name first; what is not one is thrown away.

    A request of another user may stay, and come again. A directory that cannot be read just now holds none: a run does
    not end because nobody can be heard.
    """
    requests = []
    try:
        names = storage.list(FOLDER)
    except OSError as error:
        _log.warning("requests cannot be read just now: %s", error)
        return []
    for name in names:
        if not name.endswith(".json"):
            continue  # somebody is writing it
        path = f"{FOLDER}/{name}"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            requests.append(_parse(json.loads(storage.read_bytes(path))))
        with contextlib.suppress(OSError, UserError):
            storage.remove_tree(path)
    return requests


def _parse(raw: dict[str, Any]) -> Request:
    if raw["kind"] not in ("stop", "scale"):
        raise ValueError(raw["kind"])
    return Request(str(raw["id"]), raw["kind"], tuple(map(int, raw["blocks"])), int(raw["replicas"]))


def named_blocks(state: CoordinatorState, request: Request) -> tuple[int, ...]:
    """The blocks that a `scale` request is about: those it names, or all that have not ended."""
    return request.blocks or tuple(block.index for block in state.blocks if block.state not in ENDED)


def why_not_scale(config: RunConfig, state: CoordinatorState, request: Request) -> str | None:
    """Why a `scale` request cannot be carried out now, with the numbers; None when it can."""
    count, parts = len(state.blocks), request.replicas * config.training.accumulate
    unknown = [block for block in request.blocks if not 0 <= block < count]
    if unknown:
        return f"there is no block {unknown[0]}: the run has blocks 0 to {count - 1}"
    if request.replicas < 1:
        return f"a block needs at least 1 worker, not {request.replicas}"
    if config.training.batch_size % parts:
        return f"{request.replicas} workers cannot share batches of {config.training.batch_size} samples equally" + (
            f" in {config.training.accumulate} parts" if config.training.accumulate > 1 else ""
        )
    if config.blocks.stem == "averaged" and request.replicas > 1:
        return "a block whose stem is averaged has one worker"
    if config.blocks.relay_every is not None and request.replicas > 1:
        return "a block that goes on from other blocks' features has one worker"
    if config.resources.gpus % 1 and request.replicas > 1:
        return f"workers that train a block together need whole GPUs, and resources.gpus is {config.resources.gpus:g}"
    blocks = [state.blocks[index] for index in named_blocks(state, request)]
    if ended := [block for block in blocks if block.state in ENDED]:
        return f"block {ended[0].index} is {ended[0].state}"
    free = state.slots - state.live
    # A block that waits may be asked for less than it waits for: that needs no room, and may be what lets it start.
    needed = sum(
        request.replicas - block.seats for block in blocks if block.seats > 0 or request.replicas > block.replicas
    )
    if needed > free:
        return f"needs {needed} more worker{'' if needed == 1 else 's'}, and there is room for {free} of {state.slots}"
    return None
