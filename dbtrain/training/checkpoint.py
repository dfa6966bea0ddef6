"""Checkpoints of one block: written in the background, committed whole, verified on loading.

```
checkpoints/step-00000500/{model,ema,optimizer}.safetensors(.zst)  state.json  MANIFEST
```
MANIFEST names the files with their sizes and SHA-256, and ends with the SHA-256 of itself. Locally a
checkpoint is written under a temporary name and renamed. On an object store its files go where they will
stay, under names that no other writer uses, and putting MANIFEST commits them; a folder without one is no
checkpoint there. Before it commits, a writer looks whether a newer attempt has claimed the block. No pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import safetensors
import safetensors.torch
import zstandard
from torch import Tensor

from dbtrain.errors import CorruptData, UserError
from dbtrain.run_directory import BlockDirectory
from dbtrain.storage import REPLACED, TEMPORARY, Storage, temporary_name
from dbtrain.training.room import Room
from dbtrain.training.unfinished import MANIFEST, UnfinishedCheckpoint, encode_tensors

_FORMAT = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The whole state of a block after `step` steps, in CPU tensors that nobody changes until it is written."""

    step: int
    model: dict[str, Tensor]
    """Parameters by name."""
    ema: dict[str, Tensor] | None
    """Averaged parameters by name; None in a run that keeps none."""
    optimizer: dict[str, Tensor]
    """Moments and counters by name."""
    state: dict[str, Any]
    """Whatever else resuming needs, as JSON."""


class CheckpointStore:
    """The checkpoints of one block, as the one attempt that may write them sees them."""

    def __init__(
        self,
        block: BlockDirectory,
        attempt: int,
        keep: int,
        regular: Callable[[int], bool] = lambda step: True,
        room: Room | None = None,
    ):
        """Removes what dead writers left unfinished, unless a newer attempt owns the block.

        Args:
            block: whose checkpoints.
            attempt: the writer's number; saving is refused once a newer one has claimed the block.
            keep: how many intact checkpoints remain, newest first; at least 1.
            regular: tells the steps that are saved in any case from those that a stop has chosen. Only the former
                count for `keep`: which of them there are does not depend on stops.
            room: who waits when the disk is full; nobody if not given.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; it has to be at least 1")
        self._block = block
        self._attempt = attempt
        self._keep = keep
        self._regular = regular
        self._room = Room(patient=False) if room is None else room
        self._storage = block.checkpoints
        self._damaged: set[int] = set()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self.durable_step = 0
        """Step of the newest checkpoint that this store has loaded or brought to the disk; 0 before the first."""
        if attempt >= block.current_attempt():
            self._clear_unfinished()

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint in the background, in place of one of the same step; waits for the one before.

        The tensors must not change until it has `settled`.

        Raises:
            StaleAttempt: a newer attempt owns the block; nothing was changed.
            UserError: the checkpoint before this one could not be written; this one is not written either.
            NoRoom: so it was for lack of room, and nobody waits for that any longer.
        """
        self.wait()
        self._in_flight = self._writer.submit(self._room.write, partial(self._write, snapshot))

    def settled(self, timeout: float | None = None) -> bool:
        """Whether no checkpoint is in flight any more after at most `timeout` seconds, or however long it takes; raises
        nothing of what went wrong with it."""
        return self._in_flight is None or bool(wait_for([self._in_flight], timeout).done)

    def wait(self) -> None:
        """Return when the checkpoint in flight is durable; raises what went wrong with it, once."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def close(self) -> None:
        """Wait, and end the background thread. May be called again."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending, without those that loading found damaged."""
        return [step for step in checkpoint_steps(self._block) if step not in self._damaged]

    def go_back(self, well_until: int) -> Snapshot | None:
        """Load the newest intact checkpoint up to step `well_until`, and remove those after it; None if there is none.

        Only regular checkpoints count, and of them the newest `keep`: so the choice depends on no stop and no death.
        Later ones come after those, oldest first: they were saved while training stood still.
        Warns of each damaged one on the way to it.

        Raises:
            StaleAttempt: a newer attempt owns the block; nothing was changed.
        """
        regular = [step for step in self.steps() if self._regular(step)][-self._keep :]
        earlier = [step for step in reversed(regular) if step <= well_until]
        snapshot = self._first_intact([*earlier, *(step for step in regular if step > well_until)])
        self._check_fence()
        for step in reversed(checkpoint_steps(self._block)):
            # The newest first: whatever is left if this process dies here is the history of one training.
            if snapshot is None or step > snapshot.step:
                self._storage.remove_tree(_step_name(step))
        self.durable_step = 0 if snapshot is None else snapshot.step
        return snapshot

    def load_latest(self) -> Snapshot | None:
        """The newest intact checkpoint, every file verified; None when there is no checkpoint.

        Warns of each damaged one on the way to it.

        Raises:
            CorruptData: there are checkpoints and all are damaged.
        """
        found = checkpoint_steps(self._block)
        snapshot = self._first_intact(found[::-1])
        if snapshot is not None:
            self.durable_step = snapshot.step
            return snapshot
        if found:
            raise CorruptData(
                f"all checkpoints of block {self._block.index} are damaged: {self._storage.uri}",
                value=self._storage.uri,
                mend="restore one from a backup, or remove that folder to train the block from its start",
            )
        return None

    def _first_intact(self, steps: Sequence[int]) -> Snapshot | None:
        for step in steps:
            try:
                snapshot = _load(self._storage, step)
            except CorruptData as error:
                self._damaged.add(step)
                message = f"skipping a damaged checkpoint: {error}"
                _log.warning(message)
                warnings.warn(message, stacklevel=3)
            else:
                self._damaged.discard(step)
                return snapshot
        return None

    def _write(self, snapshot: Snapshot) -> None:
        self._check_fence()
        name = _step_name(snapshot.step)
        files = UnfinishedCheckpoint(self._storage, name)
        try:
            entries = {part: files.write(filename, data) for part, filename, data in _encode(snapshot)}
            manifest = _seal({"format": _FORMAT, "step": snapshot.step, "attempt": self._attempt, "files": entries})
            files.commit(manifest, self._check_fence)
        except (OSError, UserError):
            files.discard()
            # A newer attempt removes what an older one has not finished; then that is the reason.
            self._check_fence()
            raise
        except BaseException:
            files.discard()
            raise
        self._damaged.discard(snapshot.step)
        self.durable_step = snapshot.step
        _log.info("%s/%s committed", self._storage.uri, name)
        self._prune(snapshot.step)

    def _check_fence(self) -> None:
        self._block.check_fence(self._attempt)

    def _prune(self, newest: int) -> None:
        """Keep the newest intact regular checkpoints up to step `newest`, and that one; drop the others before it."""
        before = [step for step in checkpoint_steps(self._block) if step <= newest]
        kept = [step for step in before if self._regular(step) and step not in self._damaged][-self._keep :]
        for step in before[:-1]:
            if step not in kept:
                self._storage.remove_tree(_step_name(step))

    def _clear_unfinished(self) -> None:
        for name in self._storage.list():
            final = name.removeprefix(REPLACED)
            if name.startswith(REPLACED) and not self._storage.exists(final):
                self._storage.commit_folder(name, final)
            elif name.startswith(TEMPORARY):
                # Taken away in one piece first: an older attempt may wake up and commit what is left of it.
                taken = temporary_name("dead")
                with contextlib.suppress(FileNotFoundError):
                    self._storage.commit_folder(name, taken)
                self._storage.remove_tree(taken)
            elif self._is_uncommitted(name):
                self._storage.remove_tree(name)

    def _is_uncommitted(self, name: str) -> bool:
        """Whether `name` is a checkpoint on an object store whose writer died before putting its manifest."""
        return (
            self._storage.local_path is None
            and _STEP_NAME.fullmatch(name) is not None
            and not self._storage.exists(f"{name}/{MANIFEST}")
        )


def checkpoint_steps(block: BlockDirectory) -> list[int]:
    """Steps of the checkpoints that a block has, ascending; their bytes are not looked at."""
    storage = block.checkpoints
    found = [int(match[1]) for name in storage.list() if (match := _STEP_NAME.fullmatch(name)) is not None]
    if storage.local_path is None:
        found = [step for step in found if storage.exists(f"{_step_name(step)}/{MANIFEST}")]
    return sorted(found)


def read_weights(block: BlockDirectory, which: Literal["ema", "raw"]) -> tuple[int, dict[str, Tensor]]:
    """Step and parameters of the newest checkpoint; reads and verifies the one file they are in.

    Args:
        block: whose.
        which: `ema` for the averaged parameters, `raw` for those of the last step.

    Raises:
        UserError: the block has no checkpoint, or its run keeps no averaged parameters.
        CorruptData: the newest checkpoint is damaged; an older one is never taken instead.
    """
    step, entries = _newest(block)
    part = "ema" if which == "ema" else "model"
    if part not in entries:
        raise UserError(
            f"the checkpoints of block {block.index} hold no averaged weights",
            field="weights",
            value=which,
            mend="take the raw ones, or train with ema.half_life above 0",
        )
    return step, _read_tensors(block.checkpoints, step, entries[part])


def read_state(block: BlockDirectory) -> dict[str, Any]:
    """The `state` of the newest checkpoint, verified; raises as `read_weights` does."""
    step, entries = _newest(block)
    state: dict[str, Any] = json.loads(_read_verified(block.checkpoints, step, entries["state"]))
    return state


def _newest(block: BlockDirectory) -> tuple[int, dict[str, dict[str, Any]]]:
    steps = checkpoint_steps(block)
    if not steps:
        raise UserError(
            f"block {block.index} has no checkpoint yet: {block.checkpoints.uri}",
            value=block.checkpoints.uri,
            mend="train it first",
        )
    return steps[-1], _read_manifest(block.checkpoints, steps[-1])


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _encode(snapshot: Snapshot) -> Iterator[tuple[str, str, bytes]]:
    """Part, file name and content of each file of a checkpoint, one at a time to save memory."""
    for part, tensors in (
        ("model", snapshot.model),
        ("ema", snapshot.ema),
        ("optimizer", snapshot.optimizer),
    ):
        if tensors is not None:
            ending, data = encode_tensors(tensors)
            yield part, f"{part}.{ending}", data
    yield "state", "state.json", (json.dumps(snapshot.state, sort_keys=True, indent=2) + "\n").encode()


def _load(storage: Storage, step: int) -> Snapshot:
    entries = _read_manifest(storage, step)
    model, ema, optimizer = (
        _read_tensors(storage, step, entries[part]) if part in entries else None
        for part in ("model", "ema", "optimizer")
    )
    if model is None or optimizer is None or "state" not in entries:
        raise _damaged(storage, step, MANIFEST, "does not name all parts of a checkpoint")
    state = json.loads(_read_verified(storage, step, entries["state"]))
    return Snapshot(step=step, model=model, ema=ema, optimizer=optimizer, state=state)


def _seal(content: Mapping[str, Any]) -> bytes:
    body = json.dumps(content, sort_keys=True, indent=2).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _read_manifest(storage: Storage, step: int) -> dict[str, dict[str, Any]]:
    """The manifest's entries by part."""
    body, _, seal = _read(storage, step, MANIFEST).removesuffix(b"\n").rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != seal:
        raise _damaged(storage, step, MANIFEST, "is not the one that was written")
    content = json.loads(body)
    if content["format"] != _FORMAT:
        raise UserError(
            f"checkpoints of format {content['format']} in {storage.uri}; this version reads {_FORMAT}",
            mend="use the version of dbtrain that wrote them",
        )
    if content["step"] != step:
        raise _damaged(storage, step, MANIFEST, f"belongs to step {content['step']}")
    entries: dict[str, dict[str, Any]] = content["files"]
    return entries


def _read_tensors(storage: Storage, step: int, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    data = _read_verified(storage, step, entry)
    if entry["file"].endswith(".zst"):
        data = zstandard.ZstdDecompressor().decompress(data)
    return safetensors.torch.load(data)


def _read_verified(storage: Storage, step: int, entry: Mapping[str, Any]) -> bytes:
    data = _read(storage, step, entry["file"])
    if len(data) != entry["bytes"]:
        raise _damaged(storage, step, entry["file"], f"has {len(data)} bytes instead of {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _damaged(storage, step, entry["file"], "does not have the digest of its manifest")
    return data


def _read(storage: Storage, step: int, name: str) -> bytes:
    try:
        return storage.read_bytes(f"{_step_name(step)}/{name}")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _damaged(storage, step, name, "is missing") from None
    except OSError as error:
        if error.errno != errno.EIO:  # a bad sector is damage; a network that is down is not
            raise
        raise _damaged(storage, step, name, "cannot be read from its device") from None


def _damaged(storage: Storage, step: int, name: str, problem: str) -> CorruptData:
    path = f"{storage.uri}/{_step_name(step)}/{name}"
    return CorruptData(f"{path} {problem}", value=path, mend="restore the file, or train that part again")
