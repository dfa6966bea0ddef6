"""Blocks on two machines, and the cable between them is pulled."""

from __future__ import annotations

import time
from pathlib import Path

import namespaces
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
from local_cluster import bare_cluster, wait_for

from dbtrain.data.prepare import prepare

EVERY = 100
CUT_SECONDS = 30.0  # Ray's default health checks take longer to declare a node dead
HEARTBEAT_SECONDS = 10.0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_cut_of_30_seconds_restarts_the_blocks_beyond_it_and_costs_the_others_nothing(tmp_path: Path) -> None:
    if (reason := namespaces.why_not()) is not None:
        pytest.skip(reason)
    prepare("digits", tmp_path / "digits")
    config = small_run(tmp_path, 5000, EVERY, nodes="spread", heartbeat_timeout=HEARTBEAT_SECONDS, max_restarts=20)
    undisturbed = start_undisturbed(config, tmp_path / "undisturbed")
    with closing_process(undisturbed), namespaces.two_machines() as machines, bare_cluster() as cluster:
        cluster.start_head(BLOCKS, ip=machines.first.ip, wrap=machines.first.wrap)
        cluster.add_node(BLOCKS, ip=machines.second.ip, wrap=machines.second.wrap)
        run = DisturbedRun(tmp_path, config, cluster.address, cluster.environment())
        run.start_driver(machines.first.wrap)
        try:
            for block in range(BLOCKS):
                assert run.wait_until_running(block, 2, 200.0), run.last_words()
            there = {line["block"]: line["node"] for line in run.journal if line["event"] == "block_running"}
            beyond = [block for block, node in there.items() if node == machines.second.ip]
            assert 0 < len(beyond) < BLOCKS
            machines.cut()
            mended = time.monotonic() + CUT_SECONDS
            wait_for(lambda: run.done() or time.monotonic() > mended, "the end of the cut", 2 * CUT_SECONDS)
            machines.mend()
            run.look()
            assert "finished" not in [run.blocks[block].state for block in beyond], "the run was too short"
            wait_for(run.done, "the run to end", 500.0)
        finally:
            run.close()
        run.look()
        assert run.driver is not None
        assert run.driver.returncode == 0, run.last_words()
        assert undisturbed.wait(400.0) == 0
    assert assembled_digest(run.path) == assembled_digest(tmp_path / "undisturbed")
    restarted = [line for line in run.journal if line["event"] == "block_restarting"]
    assert {line["block"] for line in restarted} == set(beyond)
    assert f"no answer for {HEARTBEAT_SECONDS:g} s" in restarted[0]["reason"]
    for block in range(BLOCKS):
        found = resumptions(block, run.blocks[block].steps)
        assert bool(found) == (block in beyond)
        assert all(resumption.lost <= 2 * EVERY for resumption in found)  # twice: it was writing when it was killed
