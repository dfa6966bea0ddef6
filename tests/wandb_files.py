"""Reading what W&B wrote offline: a header of seven bytes, then a log as LevelDB writes it, of protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """One folder offline-run-*."""

    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """Name, type, and the files of each."""
    exit_code: int | None = None


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All of them below a folder, in the order in which they were begun."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    return [_read(path) for path in files]


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    found = OfflineRun()
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                found.id, found.name, found.project = run.run_id, run.display_name, run.project
                found.group, found.job_type = run.run_group, run.job_type
                found.config |= {item.key: json.loads(item.value_json) for item in run.config.update}
            case "history":
                row = {_key(item): json.loads(item.value_json) for item in record.history.item}
                found.history.append({"_step": record.history.step.num, **row})
            case "summary":
                found.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            case "artifact":
                artifact = record.artifact
                contents = [entry.path for entry in artifact.manifest.contents]
                found.artifacts.append((artifact.name, artifact.type, contents))
            case "exit":
                found.exit_code = record.exit.exit_code
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        at += 7 + length
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts
