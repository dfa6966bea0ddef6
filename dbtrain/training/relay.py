"""Relay: a block goes on from what the blocks before it make of a sample, by weights left in the run's folder.

It trains on what it will meet in the chain: the features of the block before, its belief, and the code that the walk
has come to. Its logits are added to that belief, so that it learns to complete it.

Every `blocks.relay_every` steps a block publishes its weights (averaged ones, where the run keeps them), and looks for
those of the blocks before it. It walks the chain up to itself, forward only: nobody waits for anybody, and the death
of a worker costs the others nothing but newer weights.

```
blocks/00/relay/step-00000500.safetensors   weights for the blocks after this one, kept to the end of the run
blocks/01/relay.jsonl                       which of them block 1 used, from which of its own steps on
```
A block's bytes are a function of the configuration and of relay.jsonl, which is written before what it says is used:
whoever resumes does the same as before. A block at step s takes what others published at least one interval earlier in
their own steps, so that blocks of about equal speed all do what the plain case does: one process, block after block.

Sources: decoupled greedy learning (Belilovsky et al. 2020) for the features; functional gradient boosting (Friedman
2001) for the belief.
"""

from __future__ import annotations

import hashlib
import logging

import safetensors.torch
import torch
from torch import Tensor

from dbtrain.errors import CorruptData, UserError
from dbtrain.models import Batch, Draw, TrainableModule, family_of
from dbtrain.models.family import walk_to
from dbtrain.run_directory import BlockDirectory, RunDirectory
from dbtrain.training.ema import EMA
from dbtrain.training.initial import beginning, initial_module
from dbtrain.training.rollback import check_weights

_FOLDER = "relay"
_Seen = dict[int, int]  # by block before: the step whose weights are used, 0 for those it starts with

_log = logging.getLogger(__name__)


class Relay:
    """One block's part: it publishes for those after it, and walks the chain of those before it."""

    def __init__(self, run: RunDirectory, index: int, attempt: int, device: torch.device):
        """Builds the blocks before `index`, without gradients, in evaluation mode, with their first weights."""
        every = run.config.blocks.relay_every
        assert every is not None
        self._run, self._every, self._index, self._attempt = run, every, index, attempt
        self._directory, self._last = run.block(index), index == len(run.plan.blocks) - 1
        self._sources = [run.block(source) for source in range(index)]
        self._modules: list[TrainableModule] = []
        codebook = family_of(run.config).codebook(run.config)
        for source in range(index):
            module = initial_module(run.config, run.plan, source, codebook)
            self._modules.append(module.eval().requires_grad_(False).to(device))
        self._loaded: _Seen = dict.fromkeys(range(index), 0)
        self._looked: tuple[int, bool] | None = None  # the interval, and whether other weights are due within it
        self._schedule = _read_schedule(self._directory)

    def walk(self, batch: Batch, draw: Draw) -> Batch:
        """The batch with what the block before hands on."""
        return walk_to(self._modules, batch, draw)

    def publishes(self, step: int) -> bool:
        """Whether it is time after `step` finished steps, and somebody may want the weights."""
        return not self._last and step % self._every == 0

    def publish(self, step: int, module: TrainableModule, ema: EMA | None) -> None:
        """Leave the block's weights of `step` for those after it: what the assembly would take by default.

        What is there stays, because somebody may be training on it. Where nothing can be written, the others go on with
        older weights.

        Raises:
            NonFiniteError: weights are not finite; nothing was written.
            StaleAttempt: the block belongs to a newer attempt.
        """
        if _read(self._directory, step) is not None:
            return
        weights = dict(module.named_parameters()) if ema is None else ema.tensors()
        check_weights(weights, self._index, step)
        data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in weights.items()})
        self._directory.check_fence(self._attempt)
        try:
            self._directory.storage.sub(_FOLDER).write_atomic(_file(step), hashlib.sha256(data).digest() + data)
        except UserError as error:
            _log.warning("block %d leaves no weights of step %d: %s", self._index, step, error)

    def look(self, step: int) -> None:
        """Before the step after `step` finished ones: take the weights that the schedule names for it, or, where it
        names none for this interval yet, the newest, and write that down. What cannot be written is not done: then the
        block goes on as before to the next interval.

        Raises:
            StaleAttempt: the block belongs to a newer attempt.
        """
        due = step - step % self._every
        if not self._modules or self._looked == (due, False):
            return
        planned = [at for at in self._schedule if due <= at < due + self._every]
        at = max((at for at in self._schedule if at <= step), default=None)
        held = self._take_all({} if at is None else self._schedule[at])
        if planned and held:
            self._looked = (due, step < max(planned))
            return
        if not held:
            _log.warning("block %d: weights that it used from step %s on are gone; it takes others", self._index, at)
        self._directory.check_fence(self._attempt)
        seen = {source: self._newest_step(source, due - self._every) for source in range(self._index)}
        if due >= 2 * self._every and 0 in seen.values():
            _log.warning("block %d still takes first weights at step %d: those before it are behind", self._index, step)
        try:
            self._directory.log_relay({"step": step, "seen": {str(source): taken for source, taken in seen.items()}})
        except UserError as error:
            _log.warning("block %d goes on with the weights it has: %s", self._index, error)
            self._looked = (due, False)
            return
        self._schedule[step] = seen
        self._take_all(seen)
        self._looked = (due, False)

    def _take_all(self, seen: _Seen) -> bool:
        """Load what is named, first weights where nothing is; False if something named is not there."""
        taken = [self._take(source, seen.get(source, 0)) for source in range(self._index)]
        return all(taken)

    def _newest_step(self, source: int, until: int) -> int:
        """Step of the newest intact weights that a block published up to its step `until`; 0 for its first ones."""
        names = self._sources[source].storage.sub(_FOLDER).list()
        steps = sorted((step for name in names if (step := _step_of(name)) is not None and step <= until), reverse=True)
        return next((step for step in steps if _read(self._sources[source], step) is not None), 0)

    def _first(self, source: int) -> dict[str, Tensor]:
        return beginning(self._run.config, self._run.plan, source).model

    def _take(self, source: int, step: int) -> bool:
        """Load what a block published at a step of its own; False if it is not there."""
        if self._loaded[source] == step:
            return True
        weights = self._first(source) if step == 0 else _read(self._sources[source], step)
        if weights is None:
            return False
        with torch.no_grad():
            for name, parameter in self._modules[source].named_parameters():
                parameter.copy_(weights[name])
        self._loaded[source] = step
        return True


def _file(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def _step_of(name: str) -> int | None:
    digits = name.removeprefix("step-").removesuffix(".safetensors")
    return int(digits) if digits.isdigit() and name == _file(int(digits)) else None


def _read(source: BlockDirectory, step: int) -> dict[str, Tensor] | None:
    try:
        sealed = source.storage.sub(_FOLDER).read_bytes(_file(step))
    except FileNotFoundError:
        return None
    if hashlib.sha256(sealed[32:]).digest() != sealed[:32]:
        _log.warning("%s", CorruptData(f"{source.storage.uri}/{_FOLDER}/{_file(step)} is damaged and left out"))
        return None
    return safetensors.torch.load(sealed[32:])


def _read_schedule(directory: BlockDirectory) -> dict[int, _Seen]:
    lines = directory.relay_schedule()
    return {line["step"]: {int(source): step for source, step in line["seen"].items()} for line in lines}
