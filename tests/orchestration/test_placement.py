from __future__ import annotations

from typing import Any

import pytest

from dbtrain.errors import UserError
from dbtrain.orchestration.placement import Machine, check_room, room
from dbtrain.resources_config import ResourcesConfig


def machines(nodes: list[dict[str, float]]) -> list[Machine]:
    return [Machine(f"n{index}", resources) for index, resources in enumerate(nodes)]


@pytest.mark.parametrize(
    ("nodes", "resources", "slots"),
    [
        ([{"CPU": 2.0}], {}, [2]),
        ([{"CPU": 2.0}], {"cpus": 0.5}, [4]),
        ([{"CPU": 1.0}], {"cpus": 0.1}, [10]),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"cpus": 2}, [1, 1]),  # not 3: a worker lives on one node
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], {"gpus": 1}, [2, 0]),
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus": 0.25}, [8]),
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus": 0.4}, [4]),  # not 5: a part of a GPU is of one
        ([{"CPU": 1.0}], {"cpus": 0}, [50]),
        ([{}, {"CPU": 1.0}], {}, [0, 1]),
        ([{"CPU": 8.0, "disk": 3.0}, {"CPU": 8.0}], {"custom": {"disk": 1}}, [3, 0]),
        (
            [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0}, {"CPU": 8.0, "GPU": 8.0}],
            {"gpus": 1, "accelerator": "H100"},
            [4, 0],
        ),
    ],
)
def test_room(nodes: list[dict[str, float]], resources: dict[str, Any], slots: list[int]) -> None:
    found = room(machines(nodes), ResourcesConfig.model_validate(resources), 50)
    assert [node.slots for node in found] == slots
    assert [node.id for node in found] == [f"n{index}" for index in range(len(nodes))]


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
            "no node has all of it",
        ),
        ([], {}, "resources.cpus", "the cluster has 0"),
        ([{"CPU": 2.0}], {"custom": {"disk": 1}}, "resources.custom.disk", "asks for 1 disk a worker"),
        (
            [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0}],
            {"gpus": 1, "accelerator": "H100"},
            "resources.accelerator",
            "no node has it; the cluster has A100 (name one of those",
        ),
        (
            [{"CPU": 2.0}, {"CPU": 1.0}],
            {"replicas": 4},
            "resources.replicas",
            "asks for 4 workers a block, and 3 fit on the cluster's 2 nodes (3 CPU)",
        ),
        ([{"CPU": 8.0}], {"replicas": 4, "workers": 2}, "resources.workers", "fewer workers than the 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    nodes: list[dict[str, float]], resources: dict[str, Any], field: str, message: str
) -> None:
    asked = ResourcesConfig.model_validate(resources)
    with pytest.raises(UserError) as caught:
        check_room(machines(nodes), asked, room(machines(nodes), asked, 50))
    assert caught.value.field == field
    assert message in str(caught.value)
