from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.orchestration import ray_metrics
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.ray_cluster import Cluster, connect
from dbtrain.orchestration.ray_metrics import GAUGES, RayMetrics
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.state import BlockState, BlockStatus
from dbtrain.orchestration.stopping import StopToken

MakeConfig = Callable[..., RunConfig]
Samples = dict[str, dict[str, float]]
"""Values by the name of the gauge and the block."""


def test_metrics_that_fail_are_reported_once_and_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __init__(self, *arguments: object):
            raise OSError("no metrics here")

    monkeypatch.setattr(ray_metrics, "Gauge", Broken)
    metrics = RayMetrics()
    snapshot = Snapshot("run", None, (BlockStatus(0),), 1, False)  # type: ignore[arg-type]
    metrics.update(snapshot)
    metrics.update(snapshot)
    assert [record.getMessage() for record in caplog.records] == [
        "no more metrics for Prometheus, training is not affected: OSError: no metrics here"
    ]


def test_a_key_in_the_runs_address_is_no_label(
    monkeypatch: pytest.MonkeyPatch, small_config: MakeConfig, tmp_path: Path
) -> None:
    """The metrics port asks nobody who they are."""
    told: list[dict[str, str]] = []

    class Kept:
        def __init__(self, *arguments: object):
            pass

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append(tags)

    monkeypatch.setattr(ray_metrics, "Gauge", Kept)
    plan = start_run(small_config(), tmp_path / "run").plan
    RayMetrics().update(Snapshot("s3://KEY:SECRET@bucket/run", plan, (BlockStatus(0),), 1, False))
    assert {tags["run"] for tags in told} == {"s3://bucket/run"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One that exports its metrics more often than every ten seconds."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "200")
    here = connect()
    yield here
    here.close()


def scrape(run: Path) -> Samples:
    """What the nodes' endpoints say of a run at the moment."""
    found: Samples = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        for metric in text_string_to_metric_families(text):
            for sample in metric.samples:
                if sample.labels.get("run") == str(run):
                    assert sample.labels["name"] == "small"
                    found.setdefault(sample.name, {})[sample.labels["block"]] = sample.value
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_blocks_gauges_are_exported_and_move(cluster: Cluster, tmp_path: Path, make_config: MakeConfig) -> None:
    stop = StopToken()
    scraped: list[Samples] = []
    done = threading.Event()

    def watch_the_endpoint() -> None:
        deadline = time.monotonic() + 200
        while not done.wait(0.2) and time.monotonic() < deadline:
            samples = scrape(tmp_path)
            steps = samples.get("ray_dbtrain_step", {})
            if len(steps) == 3 and min(steps.values()) > 0 and samples.keys() == {f"ray_{name}" for name in GAUGES}:
                first = scraped[0]["ray_dbtrain_step"] if scraped else steps
                scraped.append(samples)
                if all(steps[block] > first[block] for block in steps):
                    break
        stop.request()

    scraper = threading.Thread(target=watch_the_endpoint)
    scraper.start()
    try:
        config = make_config(training={"steps": 1_000_000}, checkpoints={"every": 50}, resources={"cpus": 0.25})
        result = train_run(config, tmp_path, backend="ray", stop=stop)
    finally:
        done.set()
        scraper.join(60)
    assert result.stopped
    first, last = scraped[0], scraped[-1]
    for block in ("0", "1", "2"):
        assert last["ray_dbtrain_step"][block] > first["ray_dbtrain_step"][block] > 0
        assert last["ray_dbtrain_checkpoint_step"][block] % 50 == 0
        assert last["ray_dbtrain_steps"][block] == 1_000_000
        assert last["ray_dbtrain_samples_per_second"][block] > 0
        assert last["ray_dbtrain_loss"][block] > 0
        assert last["ray_dbtrain_restarts"][block] == last["ray_dbtrain_rollbacks"][block] == 0
        assert last["ray_dbtrain_workers"][block] == 1
        assert last["ray_dbtrain_state"][block] == list(BlockState).index(BlockState.RUNNING)
