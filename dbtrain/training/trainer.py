"""Training one block on one device: the same loop for a denoising block and for the end-to-end baseline.

A step is a function of (configuration, block, step): rows, augmentation, noise and dropout all come from keys, so a
trainer that restarts at a checkpoint repeats what an undisturbed one would have done, bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from dbtrain.errors import CorruptData, NoRoom
from dbtrain.models import Batch, Draw, family_of
from dbtrain.models.family import relays
from dbtrain.randomness import generator, seeded, step_key
from dbtrain.run_directory import RunDirectory, StaleAttempt
from dbtrain.training.averaging import StemAverager
from dbtrain.training.batches import open_batches
from dbtrain.training.checkpoint import Snapshot
from dbtrain.training.device import prepare_device
from dbtrain.training.ema import EMA
from dbtrain.training.initial import beginning, check_parameters, initial_module
from dbtrain.training.memory import peak_memory
from dbtrain.training.metrics import MetricsLog
from dbtrain.training.optimisation import (
    gradient_norm,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from dbtrain.training.planner import check_plan, origin
from dbtrain.training.progress import Progress
from dbtrain.training.relay import Relay
from dbtrain.training.rollback import NonFiniteError, Rollbacks, StepGuard, check_weights
from dbtrain.training.room import Room
from dbtrain.training.seat import Seat
from dbtrain.training.stem import averages_stems
from dbtrain.training.team import make_team, rows_of

_LOOK = 0.25  # seconds between two reports of a trainer that waits for room

_log = logging.getLogger(__name__)


class BlockTrainer:
    """Builds block `index` of a run, resumes it from its newest checkpoint, and trains it to the end."""

    def __init__(self, run: RunDirectory, index: int, attempt: int, seat: Seat | None = None, room: Room | None = None):
        """Claims the block for `attempt` and allocates this block alone; on a full disk, as soon as there is `room`.

        `seat` says which of the block's workers this is and where its time slice ends; alone and to the end by default.

        Raises:
            StaleAttempt: a newer attempt has claimed the block.
            UserError: the shards are gone or others than the plan's, or the device is not there.
            CorruptData: all checkpoints are damaged, or plan, configuration and checkpoints do not belong together.
        """
        config, plan = run.config, run.plan
        self.config, self.plan, self.index, self.attempt = config, plan, index, attempt
        self.seat = Seat() if seat is None else seat
        self._team = make_team(config, self.seat, index, attempt)
        self._directory = run.block(index)
        self._room = Room() if room is None else room
        if self._team.leads:
            self._room.write(lambda: self._directory.claim(attempt))
        self.device = prepare_device(config.resources.resolved_device)

        codebook = None if plan.blocks[index].trained is None else family_of(config).codebook(config)
        check_plan(config, plan, codebook)
        self._loader = open_batches(config, plan, index, self.seat, self.device)
        self.module = initial_module(config, plan, index, codebook).train()
        if config.training.compile:
            self.module.compile()
        self._team.prepare(self.module, self.device)
        self.optimizer = make_optimizer(self.module, config.optimiser)
        self._parameters = list(self.module.parameters())  # to look for them takes longer than many a kernel
        self.ema = EMA(self.module, config.ema) if config.ema.half_life > 0 else None

        # The end-to-end network may take fewer steps for as many layer-evaluations; its warm-up shrinks with them.
        warmup = round(config.schedule.warmup_steps * plan.steps / config.training.steps)
        self._schedule = config.schedule.model_copy(update={"warmup_steps": warmup})
        self.step = 0
        self._guard = StepGuard()
        self._rollbacks = Rollbacks()
        self._in_step = False
        self._stop = False
        # Not a method: a cycle of references would keep the block in memory after its training, until it is found.
        self._is_regular = partial(_is_regular, config.checkpoints.every, plan.steps)
        self._store = self._team.checkpoints(
            self._directory, attempt, config.checkpoints.keep, self._is_regular, self._room
        )
        self._metrics = MetricsLog(self._directory, attempt)
        self._saved_step = 0
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._loss_sum = torch.zeros((), device=self.device)
        self._relay = Relay(run, index, attempt, self.device) if relays(config, plan.kind) else None
        self._stems: StemAverager | None = None
        if averages_stems(config, plan.kind):
            assert self.seat.meeting is not None, "a backend without a meeting place refuses averaged stems"
            self._stems = StemAverager(config.blocks, index, attempt, self.seat.meeting, self.module)
        self._restore()

    def request_stop(self) -> None:
        """Finish the step in hand, save, and leave `train`; what finds no room on a full disk is not saved.

        May be called from another thread or a signal handler. Replicas leave together, when all have heard of what one
        of them was asked.
        """
        self._stop = True
        self._room.give_up()

    @property
    def trouble(self) -> str | None:
        """What is waited for at this moment, such as room on a full disk. For other threads, too."""
        return self._room.trouble

    def rows_in_hand(self) -> tuple[int, ...]:
        """Numbers of the rows in the batch of the step that has raised; none when it was not a step that raised."""
        if not self._in_step:
            return ()
        return self._loader.rows(self._cursor)

    def train(self) -> Iterator[Progress]:
        """Train to the last step; report at the start, every `logging.every` steps, and after the last save.

        While a checkpoint waits for room on a full disk, reports come several times a second.

        Raises:
            NonFiniteError: values became infinite or NaN, and `training.max_rollbacks` times of going back are used up;
                nothing is saved after them.
            RuntimeError: other replicas left, see `has_lost_others`.
            StaleAttempt: a newer attempt took the block over.
            UserError: a checkpoint could not be written.
        """
        total = self.plan.steps
        end = total
        if self.seat.until is not None:
            # At a step that is saved in any case: what is found out when saving must not depend on time slices.
            every = self.config.checkpoints.every
            end = min(total, -(-self.seat.until // every) * every)
        yield self._progress(float("nan"), 0.0)
        since, started = self.step, time.perf_counter()
        loss = rate = float("nan")
        while self.step < end:
            if self._team.stop_agreed(self._stop):
                self._stop = True  # whoever was asked
                break
            if self._relay is not None:
                self._relay.look(self.step)
            self._in_step = True
            grad_norm = self._train_step()
            self._in_step = False
            if self._stems is not None:
                self._stems.after_step(self.step, end, total, lambda: self._stop)
            telling = self.step % self.config.logging.every == 0 or self.step == total
            if telling:
                loss = self._team.mean(float(self._loss_sum)) / (self.step - since)
                rate = (self.step - since) * self.plan.batch_size / (time.perf_counter() - started)
                self._tell(loss, rate, grad_norm)
                self._loss_sum.zero_()
                since, started = self.step, time.perf_counter()
            try:
                if telling:
                    self._guard.check(self.index)
                if self._relay is not None and self._relay.publishes(self.step):
                    self._guard.check(self.index)
                    self._relay.publish(self.step, self.module, self.ema)
                if self._is_regular(self.step):
                    yield from self._wait_for_room(loss, rate)
                    self._save()
            except NoRoom:
                self._stop = True  # whoever was asked: waiting ends when the block shall stop, and not before
                break
            except NonFiniteError as error:
                yield from self._wait_for_room(loss, rate)
                self._roll_back(error)
                self._loss_sum.zero_()
                since, started = self.step, time.perf_counter()
                telling = True
            if telling and self.step < total:
                yield self._progress(loss, rate)
        yield from self._wait_for_room(loss, rate)
        self._leave()
        self._team.leave()
        yield self._progress(loss, rate, durable=True)

    def close(self) -> None:
        """Wait for the checkpoint being written, if any, but not for room; raises what went wrong with it.

        That the block belongs to a newer attempt is nothing wrong here.
        """
        self._room.give_up()
        with suppress(StaleAttempt):
            self._store.close()

    @property
    def _cursor(self) -> int:
        """The step as everything random sees it."""
        return self.step + self._rollbacks.offset

    def _wait_for_room(self, loss: float, rate: float) -> Iterator[Progress]:
        """Report while the checkpoint in flight does not come to its end."""
        while not self._team.all_agree(self._store.settled(_LOOK)):
            if self.trouble is not None:
                yield self._progress(loss, rate)

    def _leave(self) -> None:
        """Save where training has stopped; where that is not possible, what is not saved yet is given up."""
        try:
            if self._saved_step != self.step:
                self._save()
            self._store.wait()
        except (NoRoom, NonFiniteError) as error:
            if not self._stop:
                raise
            with suppress(NoRoom):
                self._store.wait()
            durable = self._store.durable_step
            _log.warning("block %d stops at step %d, not %d: %s", self.index, durable, self.step, error)
            self.step = durable
        self._store.close()
        self._metrics.close()

    def _train_step(self) -> Tensor:
        """One optimiser step; returns the gradients' norm, on the device."""
        config, cursor = self.config, self._cursor
        batch: Batch = self._loader.batch(cursor)
        draw = self.module.draw(
            self.plan.batch_size,
            generator(step_key(config.seed, "noise", block=self.index, step=cursor), self.device),
        )
        rate = learning_rate(self.step, self.plan.steps, config.optimiser.lr, self._schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Taken over instead of added to; but those of replicas are DDP's buckets, beside which others would take room.
        self.optimizer.zero_grad(set_to_none=self.seat.replicas == 1)
        self._backward(batch, self._team.share(draw))
        grad_norm = self._team.whole(gradient_norm([p.grad for p in self._parameters if p.grad is not None]))
        if config.optimiser.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, config.optimiser.clip_norm, grad_norm)
        # A fused optimiser skips its update where found_inf is 1: a guard without waiting for the device.
        self.optimizer.found_inf = self._guard.judge(grad_norm, self.step + 1)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step * self.plan.batch_size, self.plan.batch_size)
        return grad_norm

    def _backward(self, batch: Batch, draw: Draw) -> None:
        """Gradients of the mean loss over the batch, in `accumulate` parts; counts the loss of this worker's rows."""
        parts = self.config.training.accumulate
        size = self.plan.batch_size // self.seat.replicas // parts
        bfloat16 = self.config.training.precision == "bfloat16"
        key = step_key(self.config.seed, "dropout", block=self.index, step=self._cursor, replica=self.seat.replica)
        with seeded(key, self.device):
            for part in range(parts):
                rows = slice(part * size, (part + 1) * size)
                with self._team.part(last=part == parts - 1):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                        met, drawn = rows_of(batch, rows), rows_of(draw, rows)
                        met = met if self._relay is None else self._relay.walk(met, drawn)
                        loss = self._team.loss(met, drawn) / parts
                    loss.backward()  # type: ignore[no-untyped-call]
                self._loss_sum += loss.detach()

    def _save(self) -> None:
        """Snapshot to the CPU now, write in the background."""
        self._guard.check(self.index)
        self._store.settled()  # the one before is in the memory that this one takes
        model = self._cpu_copies("model", dict(self.module.named_parameters()))
        check_weights(model, self.index, self.step)
        state = {
            "origin": origin(self.plan, self.index),
            "samples": self.step * self.plan.batch_size,
            "skipped": self._guard.skipped,
            "rollbacks": self._rollbacks.to_json(),
        }
        self._store.save(
            Snapshot(
                step=self.step,
                model=model,
                ema=None if self.ema is None else self._cpu_copies("ema", self.ema.tensors()),
                optimizer=self._cpu_copies("optimizer", optimizer_tensors(self.module, self.optimizer)),
                state=state,
            )
        )
        self._saved_step = self.step

    def _cpu_copies(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the memory of the snapshot before: new pages would take several times as long as the copies.

        Who does not lead writes nothing, and keeps nothing."""
        kept, copies = self._copies.get(part, {}), {}
        for name, value in tensors.items():
            whole = self._team.whole(value.detach())
            copies[name] = kept[name].copy_(whole) if name in kept else whole.to("cpu", copy=True)
        if self._team.leads:
            self._copies[part] = copies
        return copies

    def _restore(self) -> None:
        snapshot = self._store.load_latest()
        if snapshot is None:
            return
        if snapshot.state["origin"] != origin(self.plan, self.index):
            raise CorruptData(
                f"the checkpoint of step {snapshot.step} comes from another block or run",
                field="run",
                value=self._directory.checkpoints.uri,
                mend="put back the block's own checkpoints, or remove that folder to train the block from its start",
            )
        check_parameters(snapshot, self.module, self._directory.checkpoints.uri)
        self._go_on_from(snapshot)
        self._guard.reset(snapshot.state["skipped"])
        self._rollbacks.restore(snapshot.state.get("rollbacks", []))

    def _go_on_from(self, snapshot: Snapshot) -> None:
        model = self._team.own(snapshot.model)
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(model[name])
        restore_optimizer(self.module, self.optimizer, self._team.own(snapshot.optimizer), self.device)
        if self.ema is not None:
            assert snapshot.ema is not None
            self.ema.restore(self._team.own(snapshot.ema))
        self.step = self._saved_step = snapshot.step

    def _roll_back(self, error: NonFiniteError) -> None:
        """Go on from a checkpoint with other samples and noise; raises `error` if that has been done too often."""
        if len(self._rollbacks) >= self.config.training.max_rollbacks:
            raise error
        try:
            self._store.wait()
            room = 1.0
        except NoRoom:
            room = 0.0
        if self._team.mean(room) < 1:
            return  # somebody wants the block to stop: nothing of this is saved, and the next attempt finds the same
        snapshot = self._store.go_back(error.well_until)
        self._go_on_from(beginning(self.config, self.plan, self.index) if snapshot is None else snapshot)
        self._guard.reset()
        self._rollbacks.add(error.step, self.step)
        if self._team.leads:
            self._metrics.rolled_back(self.step, from_step=error.step, reason=str(error))
        _log.warning("%s; block %d goes on from step %d with other samples", error, self.index, self.step)
        if self.step > 0:
            # At once: whoever resumes from here has to know of the roll-back. (From the beginning it repeats itself.)
            self._save()

    def _tell(self, loss: float, rate: float, grad_norm: Tensor) -> None:
        if not self._team.leads:
            return
        self._metrics.tell(
            step=self.step,
            samples=self.step * self.plan.batch_size,
            loss=loss,
            grad_norm=float(grad_norm),
            lr=self.optimizer.param_groups[0]["lr"],
            samples_per_second=rate,
            skipped=self._guard.skipped,
            checkpoint_step=self._store.durable_step,
            peak_memory=peak_memory(self.device),
            stem={} if self._stems is None else self._stems.report(),
        )

    def _progress(self, loss: float, rate: float, *, durable: bool = False) -> Progress:
        return Progress(
            block=self.index,
            attempt=self.attempt,
            step=self.step,
            total=self.plan.steps,
            loss=loss,
            samples_per_second=rate,
            checkpoint_step=self._store.durable_step,
            done=durable and self.step == self.plan.steps,
            trouble=self.trouble,
            rollbacks=len(self._rollbacks),
        )


def _is_regular(every: int, total: int, step: int) -> bool:
    """Whether the step is saved whatever happens; others are saved when somebody wants the block to stop."""
    return step % every == 0 or step == total
