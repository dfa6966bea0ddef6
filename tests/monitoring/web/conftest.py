"""A run that tells of trouble, and a monitor of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_runs import start_run
from web_monitor import EVIL, serving

from dbtrain.config import RunConfig
from dbtrain.monitoring.web.server import MonitorServer
from dbtrain.run_directory import RunDirectory


@pytest.fixture
def troubled(small_config: Callable[..., RunConfig], tmp_path: Path) -> RunDirectory:
    """A run whose driver, worker and node have names and reasons that would be markup in a page."""
    run = start_run(small_config(training={"steps": 100}), tmp_path / "run")
    run.journal({"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": EVIL, "nodes": {EVIL: 3}})
    for block in range(3):
        about = {"block": block, "attempt": 1, "step": 0}
        run.journal({"event": "block_starting", "restarts": 0, "replicas": 1, **about})
        run.journal({"event": "block_running", "pid": 8, "node": EVIL, "node_id": "n", "device": "cpu", **about})
        for step in range(10, 60, 10):
            told = {"step": step, "loss": None if step == 30 else 3 / step, "grad_norm": 1.0, "lr": 1e-3}
            run.block(block).log_metrics(told | {"samples_per_second": 50.0, "checkpoint_step": 0, "attempt": 1})
    run.journal({"event": "block_restarting", "block": 1, "attempt": 1, "step": 50, "reason": EVIL, "backoff": 1.0})
    return run


@pytest.fixture
def server(troubled: RunDirectory) -> Iterator[MonitorServer]:
    """A monitor of it."""
    with serving(troubled) as server:
        yield server
