"""A replica that dies: the others say so, and the next attempt goes on to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from replica_groups import FamilyConfig, Start, finish, replicated
from small_runs import newest_files, start_run

from dbtrain.training.checkpoint import checkpoint_steps

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("shard", "replicas", "victim"),
    [
        (False, 2, 0),
        pytest.param(True, 2, 1, marks=pytest.mark.slow),
        pytest.param(False, 2, 1, marks=pytest.mark.slow),
        pytest.param(True, 2, 0, marks=pytest.mark.slow),
        # Sums of three depend on their order.
        pytest.param(False, 3, 1, marks=pytest.mark.slow),
        pytest.param(True, 3, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(
    family_config: FamilyConfig, tmp_path: Path, start_replicas: Start, shard: bool, replicas: int, victim: int
) -> None:
    config = replicated(
        family_config,
        "vit",
        model={"dropout": 0.1},
        training={"steps": 40, "batch_size": 12},
        checkpoints={"every": 7},
        resources={"replicas": replicas, "shard": shard},
    )
    undisturbed, disturbed = (start_run(config, tmp_path / name) for name in ("undisturbed", "disturbed"))
    finish(start_replicas(undisturbed, replicas=replicas))
    group = start_replicas(disturbed, replicas=replicas)
    dying = group.pop(victim)
    dying.wait_for(16)  # saving that of step 14 has waited for that of step 7
    dying.process.kill()
    for survivor in group:
        kind, step, reason = survivor.outcome()
        assert kind == "lost"
        assert 14 <= step <= 40
        assert reason
    left = checkpoint_steps(disturbed.block(0))[-1]
    assert left < 40, "it was killed too late to matter"
    finish(start_replicas(disturbed, attempt=2, replicas=replicas))
    assert newest_files(disturbed) == newest_files(undisturbed)


def test_a_newer_attempt_ends_the_group(family_config: FamilyConfig, tmp_path: Path, start_replicas: Start) -> None:
    """Replica 0 alone is refused by the fence; the others hear of it by its leaving."""
    config = replicated(family_config, "vit", training={"steps": 5000}, checkpoints={"every": 10})
    run = start_run(config, tmp_path / "run")
    group = start_replicas(run)
    group[0].wait_for(10)
    run.block(0).claim(2)
    kind, _, reason = group[0].outcome()
    assert kind == "error"
    assert reason.startswith("StaleAttempt")
    assert group[1].outcome()[0] == "lost"
