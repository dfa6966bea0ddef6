"""How long a training step takes on this device, by taking some on made-up samples; nothing is read or written.

The step is the trainer's: draw, forward and backward in parts, norm, clipping, optimiser, average. What is left out is
what goes on beside it: loading, checkpoints, and what replicas or averaged stems send each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.models import TrainableModule, family_of
from dbtrain.models.family import relays, walk_to
from dbtrain.plan import BlockPlan, Plan
from dbtrain.randomness import generator
from dbtrain.training.device import prepare_device
from dbtrain.training.ema import EMA
from dbtrain.training.memory import is_out_of_memory, oom_advice
from dbtrain.training.optimisation import gradient_norm, make_optimizer
from dbtrain.training.planner import build_module
from dbtrain.training.team import rows_of

WARM_UP = 3
"""Steps before the clock starts: they compile, and make the optimiser's state."""
STEPS = 20


def costliest(plan: Plan) -> BlockPlan:
    """The block whose step takes longest by its FLOPs; the first of several."""
    return max(plan.blocks, key=lambda block: block.flops_per_sample)


def seconds_a_step(config: RunConfig, plan: Plan) -> float:
    """Median of `STEPS` steps of `plan`'s costliest block on this device, with the configured threads.

    Raises:
        UserError: the device is not there, or too small.
    """
    block = costliest(plan)
    with _threads(plan.threads):
        try:
            step = Step(config, plan, block, prepare_device(config.resources.resolved_device))
            return statistics.median([step.seconds() for _ in range(WARM_UP + STEPS)][WARM_UP:])
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(oom_advice(config, plan, block.index)) from None
            raise


class Step:
    """The training step of one worker, on the same example batch each time."""

    def __init__(self, config: RunConfig, plan: Plan, block: BlockPlan, device: torch.device):
        """Builds the block with random weights; of several replicas it is one, with its share of the batch."""
        self.config, self.device = config, device
        family = family_of(config)
        codebook = None if block.trained is None else family.codebook(config)

        def build(one: BlockPlan) -> TrainableModule:
            return build_module(family, config, one.layers, one.trained, codebook).to(device)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.module = build(block).train()
            earlier = plan.blocks[: block.index] if relays(config, plan.kind) else ()
            self._before = [build(one).eval() for one in earlier]
        if config.training.compile:
            self.module.compile()
        self.optimizer = make_optimizer(self.module, config.optimiser)
        self._parameters = list(self.module.parameters())
        self.ema = EMA(self.module, config.ema) if config.ema.half_life > 0 else None
        self.rows = config.training.batch_size // config.resources.replicas
        with device:
            self.batch = family.example_batch(config, self.rows)
        # Of mean size: where chance decides on it, a few steps would not say how long many take.
        self.draw = {name: value.to(device) for name, value in self.module.example_draw(self.rows).items()}
        self._source = generator(config.seed, device)

    def seconds(self) -> float:
        """Take a step; wait for the device before and after it."""
        self._wait()
        started = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - started

    def __call__(self) -> None:
        """Take a step."""
        training, optimiser = self.config.training, self.config.optimiser
        self.module.draw(self.rows, self._source)  # for the time it takes
        self.optimizer.zero_grad(set_to_none=self.config.resources.replicas == 1)
        size = self.rows // training.accumulate
        for first in range(0, self.rows, size):
            part, drawn = (rows_of(tensors, slice(first, first + size)) for tensors in (self.batch, self.draw))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
                loss = self.module.training_loss(walk_to(self._before, part, drawn), drawn) / training.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
        norm = gradient_norm([p.grad for p in self._parameters if p.grad is not None])
        if optimiser.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, optimiser.clip_norm, norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(training.batch_size, training.batch_size)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
