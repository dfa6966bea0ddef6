"""Training one block on one device: the same loop for a denoising block and for the end-to-end baseline.

A step is a function of (configuration, block, step): rows, augmentation, noise and dropout all come from keys, so a
trainer that restarts at a checkpoint repeats what an undisturbed one would have done, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.data.batches import make_transform
from dbtrain.data.loader import BatchLoader
from dbtrain.data.order import SampleOrder
from dbtrain.data.shards import ShardSet
from dbtrain.errors import CorruptData, UserError
from dbtrain.models import Batch, Draw, family_of
from dbtrain.randomness import derive_key, generator, step_key
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import Snapshot
from dbtrain.training.device import prepare_device
from dbtrain.training.ema import EMA
from dbtrain.training.optimisation import (
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from dbtrain.training.planner import build_module, check_plan, origin
from dbtrain.training.seat import Seat
from dbtrain.training.team import make_team

MAX_CONSECUTIVE_SKIPS = 20
"""Optimiser steps in a row that may be skipped for a non-finite gradient before the block gives up."""


class NonFiniteError(RuntimeError):
    """Gradients stayed infinite or NaN for `MAX_CONSECUTIVE_SKIPS` steps, or a parameter became so."""


@dataclass(frozen=True)
class Progress:
    """Where a block's training stands."""

    block: int
    attempt: int
    step: int
    """Finished optimiser steps."""
    total: int
    loss: float
    """Mean training loss since the last report; NaN before the first step."""
    samples_per_second: float
    checkpoint_step: int
    """Step of the newest durable checkpoint, 0 if there is none."""
    done: bool
    """True once the last step is durably saved."""
    trouble: str | None = None
    """What the worker waits for, such as room on a full disk."""
    rollbacks: int = 0
    """How often the block has gone back to a checkpoint because of infinite or NaN values, in all its attempts."""


class BlockTrainer:
    """Builds block `index` of a run, resumes it from its newest checkpoint, and trains it to the end."""

    def __init__(self, run: RunDirectory, index: int, attempt: int, seat: Seat | None = None):
        """Claims the block for `attempt` and allocates this block alone.

        `seat` says which of the block's workers this is and where its time slice ends; alone and to the end by default.

        Raises:
            StaleAttempt: a newer attempt has claimed the block.
            RuntimeError: other replicas did not come or left, see `has_lost_others`.
            UserError: the shards are gone or others than the plan's, or the device is not there.
            CorruptData: all checkpoints are damaged, or plan, configuration and checkpoints do not belong together.
        """
        config, plan = run.config, run.plan
        assert plan.data is not None, "a run directory's plan knows its data"
        self.config, self.plan, self.index, self.attempt = config, plan, index, attempt
        self.seat = Seat() if seat is None else seat
        self._team = make_team(config, self.seat, index, attempt)
        self._directory = run.block(index)
        if self._team.leads:
            self._directory.claim(attempt)
        self.device = prepare_device(config.resources.resolved_device)

        block = plan.blocks[index]
        family = family_of(config)
        codebook = family.codebook(config) if block.trained is not None else None
        check_plan(config, plan, codebook)
        shards = ShardSet.open(config.data.shards, "train")
        if shards.manifest.facts().sha256 != plan.data.sha256:
            raise UserError(
                "the shards here are not those the run was planned with",
                field="data.path",
                value=str(config.data.shards),
                mend="every machine has to see the same prepared data",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_key(config.seed, "init", plan.kind, index))
            module = build_module(family, config, block.layers, block.trained, codebook)
            family.start_from(config, block.layers, module)
        self.module = module.train()
        if config.training.compile:
            self.module.compile()
        self._team.prepare(module, self.device)
        self.optimizer = make_optimizer(self.module, config.optimiser)
        self.ema = EMA(self.module, config.ema) if config.ema.half_life > 0 else None

        scaling = family.scaling(config, plan.data)
        transform = make_transform(config, plan.data, scaling, derive_key(config.seed, "augment", index))
        order = SampleOrder(shards.rows, config.seed, index, self.seat.replica, self.seat.replicas)
        self._loader = BatchLoader(shards, order, transform, plan.batch_size, self.device)

        # The end-to-end network may take fewer steps for as many layer-evaluations; its warm-up shrinks with them.
        warmup = round(config.schedule.warmup_steps * plan.steps / config.training.steps)
        self._schedule = config.schedule.model_copy(update={"warmup_steps": warmup})
        self.step = 0
        self._skipped = torch.zeros((), device=self.device)  # consecutive non-finite steps
        self._most_skipped = torch.zeros((), device=self.device)
        self._stop = False
        self._store = self._team.checkpoints(self._directory, attempt, config.checkpoints.keep)
        self._saved_step = 0
        self._loss_sum = torch.zeros((), device=self.device)
        self._restore()

    def request_stop(self) -> None:
        """Finish the step in hand, save, and leave `train`. May be called from another thread.

        Replicas leave together, when all have heard of what one of them was asked.
        """
        self._stop = True

    def train(self) -> Iterator[Progress]:
        """Train to the last step; report at the start, every `logging.every` steps, and after the last save.

        Raises:
            NonFiniteError: too many steps in a row had non-finite gradients; nothing is saved after them.
            RuntimeError: other replicas left, see `has_lost_others`.
            StaleAttempt: a newer attempt took the block over.
            UserError: a checkpoint could not be written.
        """
        total = self.plan.steps
        end = total if self.seat.until is None else min(self.seat.until, total)
        yield self._progress(float("nan"), 0.0)
        since, started = self.step, time.perf_counter()
        loss = rate = float("nan")
        while self.step < end and not self._team.stop_agreed(self._stop):
            grad_norm = self._train_step()
            telling = self.step % self.config.logging.every == 0 or self.step == total
            if telling:
                loss = self._team.mean(float(self._loss_sum)) / (self.step - since)
                rate = (self.step - since) * self.plan.batch_size / (time.perf_counter() - started)
                self._log(loss, rate, grad_norm)
                self._check_finite()
                self._loss_sum.zero_()
                since, started = self.step, time.perf_counter()
            if self.step % self.config.checkpoints.every == 0 or self.step == total:
                self._save()
            if telling and self.step < total:
                yield self._progress(loss, rate)
        if self._saved_step != self.step:
            self._save()
        self._store.close()
        self._team.leave()
        yield self._progress(loss, rate, durable=True)

    def close(self) -> None:
        """Wait for the checkpoint being written, if any."""
        self._store.close()

    def _train_step(self) -> Tensor:
        """One optimiser step; returns the gradients' norm, on the device."""
        config, step = self.config, self.step
        batch = self._loader.batch(step)
        draw = self.module.draw(
            self.plan.batch_size,
            generator(step_key(config.seed, "noise", block=self.index, step=step), self.device),
        )
        rate = learning_rate(step, self.plan.steps, config.optimiser.lr, self._schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=False)
        self._loss_sum += self._backward(batch, self._team.share(draw))
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        grad_norm = self._team.whole(torch.nn.utils.get_total_norm(grads))
        if config.optimiser.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), config.optimiser.clip_norm, grad_norm)
        # A fused optimiser skips its update where found_inf is 1: a guard without waiting for the device.
        found_inf = 1.0 - torch.isfinite(grad_norm).float()
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        self._skipped = (self._skipped + 1.0) * found_inf
        self._most_skipped = torch.maximum(self._most_skipped, self._skipped)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step * self.plan.batch_size, self.plan.batch_size)
        return grad_norm

    def _backward(self, batch: Batch, draw: Draw) -> Tensor:
        """Gradients of the mean loss over the batch, in `accumulate` parts; returns the loss of this worker's rows."""
        parts = self.config.training.accumulate
        size = self.plan.batch_size // self.seat.replicas // parts
        bfloat16 = self.config.training.precision == "bfloat16"
        total = torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            key = step_key(self.config.seed, "dropout", block=self.index, step=self.step, replica=self.seat.replica)
            torch.manual_seed(key)
            for part in range(parts):
                rows = slice(part * size, (part + 1) * size)
                with self._team.part(last=part == parts - 1):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                        loss = self._team.loss(_rows(batch, rows), _rows(draw, rows)) / parts
                    loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        return total

    def _check_finite(self) -> None:
        """Asked only where the device is waited for anyway; the most that was skipped in a row is remembered."""
        if int(self._most_skipped) >= MAX_CONSECUTIVE_SKIPS:
            raise NonFiniteError(
                f"block {self.index}: gradients were not finite in {int(self._most_skipped)} steps in a row, up to step"
                f" {self.step}; lower optimiser.lr or set optimiser.clip_norm"
            )

    def _save(self) -> None:
        """Snapshot to the CPU now, write in the background."""
        self._check_finite()
        model = self._cpu_copies(dict(self.module.named_parameters()))
        for name, value in model.items():
            if not value.isfinite().all():
                raise NonFiniteError(
                    f"block {self.index}: {name} is not finite at step {self.step}; lower optimiser.lr"
                )
        state = {
            "origin": origin(self.plan, self.index),
            "samples": self.step * self.plan.batch_size,
            "skipped": int(self._skipped),
        }
        self._store.save(
            Snapshot(
                step=self.step,
                model=model,
                ema=None if self.ema is None else self._cpu_copies(self.ema.tensors()),
                optimizer=self._cpu_copies(optimizer_tensors(self.module, self.optimizer)),
                state=state,
            )
        )
        self._saved_step = self.step

    def _cpu_copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._team.whole(value.detach()).to("cpu", copy=True) for name, value in tensors.items()}

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
        model = self._team.own(snapshot.model)
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(model[name])
        restore_optimizer(self.module, self.optimizer, self._team.own(snapshot.optimizer), self.device)
        if self.ema is not None:
            assert snapshot.ema is not None
            self.ema.restore(self._team.own(snapshot.ema))
        self._skipped.fill_(float(snapshot.state["skipped"]))
        self.step = self._saved_step = snapshot.step

    def _log(self, loss: float, rate: float, grad_norm: Tensor) -> None:
        if not self._team.leads:
            return
        self._directory.log_metrics(
            {
                "step": self.step,
                "samples": self.step * self.plan.batch_size,
                # JSON has no word for NaN and infinity.
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": float(grad_norm) if grad_norm.isfinite() else None,
                "lr": self.optimizer.param_groups[0]["lr"],
                "samples_per_second": rate,
                "skipped": int(self._skipped),
                "attempt": self.attempt,
            }
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
        )


def _rows(tensors: Batch, rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in tensors.items()}
