from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import dbtrain
from dbtrain.training import machine
from dbtrain.training.machine import machine_facts

CPU = torch.device("cpu")


def test_what_this_machine_is() -> None:
    facts = machine_facts(CPU)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["machine"] == platform.node()
    assert facts["versions"]["dbtrain"] == dbtrain.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert facts["memory"] is None or facts["memory"] > 1e8
    assert facts["device"] == facts["processor"]


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(*arguments: object) -> str:
        raise PackageNotFoundError

    def refuse(*arguments: object) -> str:
        raise OSError

    monkeypatch.setattr(machine, "version", nothing)
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr("os.sysconf", refuse)
    monkeypatch.setattr("platform.processor", lambda: "")
    facts = machine_facts(CPU)
    assert facts["versions"]["ray"] is None
    assert facts["memory"] is None
    assert facts["processor"] == platform.machine()
