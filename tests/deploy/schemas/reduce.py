"""Makes kuberay.json from KubeRay's custom resource definitions: python reduce.py RAYCLUSTERS.yaml RAYJOBS.yaml

Descriptions and the status go, equal parts are kept once, and fields that a definition does not list are refused, as
`kubectl apply` refuses them.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

_WORTH_SHARING = 120  # characters


def served_schema(definition: Path) -> tuple[str, dict[str, Any]]:
    """Kind and schema of the version v1."""
    spec = yaml.load(definition.read_text(), Loader=yaml.CSafeLoader)["spec"]
    schema = next(version for version in spec["versions"] if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    del schema["properties"]["status"]
    return spec["names"]["kind"], _strict(schema)


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _strict(value) for key, value in node.items() if not (key == "description" and isinstance(value, str))}
    if isinstance(kept.get("properties"), dict) and kept.get("type") == "object":
        kept.setdefault("additionalProperties", False)
    return kept


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """The same schemas, with parts that occur more than once moved to `$defs`."""
    counts: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                count(child)
        if isinstance(node, dict) and isinstance(node.get("type"), str) and len(_text(node)) > _WORTH_SHARING:
            counts[_text(node)] += 1

    count(schemas)
    names = {text: f"part{number}" for number, text in enumerate(sorted(t for t, times in counts.items() if times > 1))}
    parts: dict[str, Any] = {}

    def move(node: Any) -> Any:
        if isinstance(node, list):
            return [move(item) for item in node]
        if not isinstance(node, dict):
            return node
        name = names.get(_text(node))
        inner = {key: move(value) for key, value in node.items()}
        if name is None:
            return inner
        parts[name] = inner
        return {"$ref": f"#/$defs/{name}"}

    moved = move(schemas)
    return {**moved, "$defs": dict(sorted(parts.items()))}


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True)


if __name__ == "__main__":
    result = shared(dict(served_schema(Path(name)) for name in sys.argv[1:]))
    # A line a definition, so that a newer version's difference can be read.
    lines = []
    for key, value in result.items():
        if key == "$defs":
            rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(part)}" for name, part in value.items())
            lines.append(f'"$defs": {{\n{rows}\n}}')
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    Path(__file__).with_name("kuberay.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
