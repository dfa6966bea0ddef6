"""The head of the cluster dies: what the driver says, and how the run goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from chaos_checks import resumptions
from disturbed_run import (
    BLOCKS,
    DisturbedRun,
    assembled_digest,
    closing_process,
    small_run,
    start_undisturbed,
)
from local_cluster import local_cluster, wait_for

from dbtrain.data.prepare import prepare

EVERY = 50


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_whose_cluster_lost_its_head_says_so_and_goes_on_on_another(tmp_path: Path) -> None:
    prepare("digits", tmp_path / "digits")
    config = small_run(tmp_path, 1500, EVERY, nodes="spread")
    undisturbed = start_undisturbed(config, tmp_path / "undisturbed")
    # The first cluster stays: workers on its other node do not know yet that nobody listens to them.
    with closing_process(undisturbed), local_cluster(nodes=2, cpus=2) as first, local_cluster(nodes=1, cpus=4) as other:
        run = DisturbedRun(tmp_path, config, first.address, first.environment())
        run.start_driver()
        try:
            assert run.wait_until_running(0, 2 * EVERY, 200.0), run.last_words()
            for pid in (first.head.gcs(), first.head.raylet()):
                os.kill(pid, signal.SIGKILL)
            wait_for(run.done, "the driver to give up", 100.0)
            assert run.driver is not None
            assert run.driver.returncode == 1
            (message,) = [line for line in run.errors().read_text().splitlines() if line.startswith("dbtrain: ")]
            assert "head" in message
            assert "Traceback" not in run.errors().read_text()
            run.look()
            assert run.journal[-1]["event"] == "run_interrupted"

            run.address, run.environment = other.address, other.environment()
            run.start_driver()
            wait_for(run.done, "the run to end", 300.0)
            assert run.driver.returncode == 0, run.last_words()
        finally:
            run.close()
        assert undisturbed.wait(300.0) == 0
    run.look()
    assert assembled_digest(run.path) == assembled_digest(tmp_path / "undisturbed")
    for block in range(BLOCKS):
        assert all(found.lost <= 2 * EVERY for found in resumptions(block, run.blocks[block].steps))
