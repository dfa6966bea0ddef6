"""`train_run`: from a configuration to a trained run directory, on either backend, new or resumed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dbtrain.config import RunConfig
from dbtrain.data.node_cache import local_shards
from dbtrain.data.prepare import ensure_prepared
from dbtrain.data.shards import ShardSet
from dbtrain.errors import CorruptData, UserError
from dbtrain.monitoring.sinks import Sinks, check_sinks
from dbtrain.orchestration.backend import Backend
from dbtrain.orchestration.driver import Driver, Snapshot, Watcher, Watchers
from dbtrain.orchestration.lock import driver_lock
from dbtrain.orchestration.state import BlockState, BlockStatus, Policy, initial_state
from dbtrain.orchestration.stopping import StopToken, stop_on_signals
from dbtrain.plan import Kind, Plan
from dbtrain.resources_config import ResourcesConfig
from dbtrain.run_directory import PLAN, RunDirectory, check_vacant
from dbtrain.storage import Storage
from dbtrain.training.checkpoint import checkpoint_steps, read_weights
from dbtrain.training.planner import make_plan
from dbtrain.training.stem import check_backend_meets

BackendName = Literal["inline", "ray"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockResult:
    """How one block ended."""

    index: int
    state: BlockState
    step: int
    restarts: int
    reason: str | None


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run: str
    """Path or URI of the run directory."""
    blocks: tuple[BlockResult, ...]

    @property
    def ok(self) -> bool:
        """Every block is finished."""
        return all(block.state is BlockState.FINISHED for block in self.blocks)

    @property
    def stopped(self) -> bool:
        """Somebody stopped the run; starting it again goes on."""
        return any(block.state is BlockState.STOPPED for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        blocks = [
            {
                "index": b.index,
                "state": b.state.value,
                "step": b.step,
                "restarts": b.restarts,
                "reason": b.reason,
            }
            for b in self.blocks
        ]
        return {"run": self.run, "ok": self.ok, "blocks": blocks}


def train_run(
    config: RunConfig,
    run_path: str | Path,
    kind: Kind = "blocks",
    backend: BackendName = "inline",
    address: str | None = None,
    order: Sequence[int] | None = None,
    watch: Watcher | None = None,
    stop: StopToken | None = None,
) -> RunResult:
    """Train every block of a run; resume what the run directory already holds.

    Args:
        config: the run.
        run_path: the run directory, a local path or a URI.
        kind: block by block, or the end-to-end baseline.
        backend: `ray` for one worker process a block, `inline` for this process, one block after the other.
        address: of a Ray cluster to join; a private one is started on this machine when not given.
        order: in which blocks get a free slot; by index when not given.
        watch: sees every change.
        stop: lets others stop the run; SIGINT and SIGTERM do so in any case.

    Returns:
        How each block ended. A block that failed is no exception: the others were trained.

    Raises:
        UserError: the data, the run directory or the resources are not what the configuration needs.
    """
    config = config.located()
    check_sinks(config, Storage.open(run_path))
    manifest = ensure_prepared(config)
    facts = manifest.facts()
    # Copies are for the machines that train; the driver of a cluster need not be one of them.
    if address is None or not config.data.cached:
        ShardSet.open(local_shards(config.data, facts.sha256), "train").verify()
    plan = make_plan(config, kind, facts)

    storage = Storage.open(run_path)
    if storage.exists(PLAN):
        blocks = _found(RunDirectory.open_same(storage, config, plan))
        if all(block.state is BlockState.FINISHED for block in blocks):
            run = RunDirectory.create_or_resume(storage, config, plan)
            if watch is not None:
                watch.update(Snapshot(storage.uri, run.plan, blocks, 0, False))
            return _result(storage.uri, blocks)
    else:
        check_vacant(storage)

    stop = StopToken() if stop is None else stop
    # The backend comes before the run directory: a run that no node can hold leaves nothing behind.
    # Sinks are waited for last: until then others may have the room of the workers.
    with (
        ExitStack() as afterwards,
        closing(_open_backend(backend, config, plan, address, stop)) as workers,
        stop_on_signals(stop),
    ):
        if not storage.exists(PLAN):
            RunDirectory.create_or_resume(storage, config, plan)
        with driver_lock(storage):
            # Behind the lock: a driver that is refused leaves the configuration of the one at work alone.
            run = RunDirectory.create_or_resume(storage, config, plan)
            workers.attach(storage.uri)
            resources = config.resources
            state = initial_state(
                _found(run), nodes=workers.nodes(), policy=_policy(resources), order=order, limit=resources.workers
            )
            sinks = afterwards.enter_context(Sinks(run))
            state = Driver(run, state, workers, stop, Watchers(watch, sinks, _metrics(backend, config))).loop()
    return _result(storage.uri, state.blocks)


def _open_backend(name: BackendName, config: RunConfig, plan: Plan, address: str | None, stop: StopToken) -> Backend:
    if name == "inline":
        from dbtrain.orchestration.inline_backend import InlineBackend, check_gpus

        check_gpus(config.resources)
        if config.resources.replicas > 1:
            _log.warning("resources.replicas is ignored: the inline backend trains a block with one worker")
        check_backend_meets(config, plan.kind)
        return InlineBackend(config.resources.resolved_device, stop)
    try:
        from dbtrain.orchestration.ray_backend import RayBackend
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        mend = "install 'ray[default]', or use --backend inline"
        raise UserError("Ray is not installed here", field="--backend", value=name, mend=mend) from None

    return RayBackend(config, plan, address)


def _metrics(backend: BackendName, config: RunConfig) -> Watcher | None:
    if backend != "ray" or not config.monitoring.prometheus:
        return None
    from dbtrain.orchestration.ray_metrics import RayMetrics

    return RayMetrics()


def _policy(resources: ResourcesConfig) -> Policy:
    return Policy(
        max_restarts=resources.max_restarts,
        start_timeout=resources.start_timeout,
        heartbeat_timeout=resources.heartbeat_timeout,
        step_timeout=resources.step_timeout,
        slice_steps=resources.interleave,
        slow_factor=resources.slow_factor,
        move_slow=resources.slow_action == "move",
    )


def _found(run: RunDirectory) -> tuple[BlockStatus, ...]:
    """Where each block stands according to what is durably there."""
    # A worker claims its attempt some time after it was started. If its driver died in between, only the journal
    # knows the number, and giving it to a second worker would defeat the fence between the two.
    started = Counter[int]()
    for line in run.events():
        if line["event"] == "block_starting":
            started[line["block"]] = max(started[line["block"]], line["attempt"])
    return tuple(_block_found(run, index, started[index]) for index in range(len(run.plan.blocks)))


def _block_found(run: RunDirectory, index: int, started: int) -> BlockStatus:
    block = run.block(index)
    steps = checkpoint_steps(block)
    newest = steps[-1] if steps else 0
    state, reason = BlockState.PENDING, None
    if newest == run.plan.steps:
        try:
            for which in ("raw", "ema") if run.config.ema.half_life > 0 else ("raw",):
                read_weights(block, which)
            state = BlockState.FINISHED
        except CorruptData as error:
            reason = str(error)  # its trainer goes back to the checkpoint before
    return BlockStatus(
        index,
        state=state,
        replicas=run.config.resources.replicas,
        cost=run.plan.blocks[index].evaluations,
        attempt=max(block.current_attempt(), started),
        step=newest,
        checkpoint_step=newest,
        reason=reason,
    )


def _result(uri: str, blocks: Sequence[BlockStatus]) -> RunResult:
    return RunResult(uri, tuple(BlockResult(b.index, b.state, b.step, b.restarts, b.reason) for b in blocks))
