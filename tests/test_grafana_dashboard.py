from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dbtrain.orchestration.ray_metrics import GAUGES, TAGS
from dbtrain.orchestration.state import BlockState

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((HERE.parent / "cluster/grafana-dashboard.json").read_text())
    return loaded


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_it_is_what_grafanas_schema_describes(dashboard: dict[str, Any]) -> None:
    schema = json.loads((HERE / "schemas/grafana-dashboard.jsonschema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(dashboard)


def test_it_shows_every_metric_and_none_that_there_is_not(dashboard: dict[str, Any]) -> None:
    shown = {name for text in expressions(dashboard) for name in re.findall(r"[a-z_]*dbtrain_[a-z_]+", text)}
    assert shown == {f"ray_{name}" for name in GAUGES}
    for text in expressions(dashboard):
        assert text.count("(") == text.count(")")
        for chosen in re.findall(r"\{(.*?)\}", text):
            assert chosen == 'run="$run"'
        assert set(re.findall(r"by \((\w+)\)", text)) <= set(TAGS)


def test_panels_lie_side_by_side_and_ask_the_chosen_data_source(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    data_source, run = dashboard["templating"]["list"]
    assert (data_source["name"], data_source["type"]) == ("datasource", "datasource")
    assert data_source["query"] == "prometheus"
    assert (run["name"], run["definition"]) == ("run", "label_values(ray_dbtrain_step, run)")


def test_states_have_their_names(dashboard: dict[str, Any]) -> None:
    [timeline] = [panel for panel in dashboard["panels"] if panel["type"] == "state-timeline"]
    [mapping] = timeline["fieldConfig"]["defaults"]["mappings"]
    named = {int(number): option["text"] for number, option in mapping["options"].items()}
    assert named == dict(enumerate(state.value for state in BlockState))
    failed = list(BlockState).index(BlockState.FAILED)
    [count] = [text for text in expressions(dashboard) if "==" in text]
    assert f"== {failed})" in count
