from __future__ import annotations

import pytest

from dbtrain.errors import UserError
from dbtrain.orchestration.placement import worker_slots
from dbtrain.resources_config import ResourcesConfig


@pytest.mark.parametrize(
    ("nodes", "resources", "blocks", "slots"),
    [
        ([{"CPU": 2.0}], {}, 8, 2),
        ([{"CPU": 2.0}], {"cpus": 0.5}, 8, 4),
        ([{"CPU": 1.0}], {"cpus": 0.1}, 12, 10),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"cpus": 2}, 8, 2),  # not 3: a worker lives on one node
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], {"gpus": 1}, 8, 2),
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus": 0.25}, 20, 8),
        ([{"CPU": 64.0}], {"workers": 3}, 8, 3),
        ([{"CPU": 64.0}], {}, 5, 5),
        ([{"CPU": 1.0}], {"cpus": 0}, 5, 5),
        ([{}, {"CPU": 1.0}], {}, 5, 1),
    ],
)
def test_slots(nodes: list[dict[str, float]], resources: dict[str, float], blocks: int, slots: int) -> None:
    assert worker_slots(nodes, ResourcesConfig.model_validate(resources), blocks) == slots


@pytest.mark.parametrize(
    ("nodes", "resources", "field", "message"),
    [
        (
            [{"CPU": 2.0}],
            {"gpus": 1},
            "resources.gpus",
            "asks for 1 GPU a worker, and the cluster has 0 (set resources.gpus=0, or add nodes with GPUs)",
        ),
        (
            [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}],
            {"gpus": 2},
            "resources.gpus",
            "the cluster has 2, at most 1 on one node",
        ),
        ([{"CPU": 2.0}], {"cpus": 3}, "resources.cpus", "asks for 3 CPUs a worker, and the cluster has 2"),
        (
            [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}],
            {"cpus": 2, "gpus": 1},
            "resources.cpus",
            "no node has both",
        ),
        ([], {}, "resources.cpus", "the cluster has 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    nodes: list[dict[str, float]], resources: dict[str, float], field: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        worker_slots(nodes, ResourcesConfig.model_validate(resources), 4)
    assert caught.value.field == field
    assert message in str(caught.value)
