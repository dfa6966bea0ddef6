"""The machine and the software that train a block, told by the process that does it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dbtrain", "torch", "ray", "numpy")
"""Whose versions are told."""


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Plain data: `machine` (its name), `platform`, `processor`, `cores` (logical ones that this process may use),
    `memory` (bytes), `device` (the processor or the GPU's name), `device_memory` (bytes), `python`, and `versions` by
    package; None where this system does not tell."""
    processor, memory = _processor(), _memory()
    facts: dict[str, Any] = {
        "machine": platform.node(),
        "platform": platform.platform(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": memory,
        "device": processor,
        "device_memory": memory,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"device": gpu.name, "device_memory": gpu.total_memory}
        facts["versions"]["cuda"] = torch.version.cuda
    return facts


def _processor() -> str | None:
    """The processor's model as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or platform.machine() or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
