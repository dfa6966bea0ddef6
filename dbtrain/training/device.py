"""Choosing the device, and making a worker's arithmetic repeatable."""

from __future__ import annotations

import ctypes
import os
from typing import Literal

import torch

from dbtrain.errors import UserError


def inference_device(name: str | torch.device) -> torch.device:
    """The device of that name, such as cpu or cuda:1.

    Raises:
        UserError: there is no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: a PyTorch without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot be used: {reason}", field="device", value=str(name), mend="use cpu") from None
    return device


# Parameters of glibc's mallopt, each with the largest value that it takes.
_MMAP_THRESHOLD = (-3, 32 << 20)
_TRIM_THRESHOLD = (-1, 2**31 - 1)


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next step, where it is glibc.

    As it comes, it returns what is free at the end of the heap to the system, which hands it out again page by page,
    each set to zero first: 2 to 7 % of a step on a CPU (docs/lab-notes.md). Pieces above 32 MiB still go back. What
    PyTorch has allocated at most stays the same; the process may hold a few percent more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(*_MMAP_THRESHOLD)
        mallopt(*_TRIM_THRESHOLD)


def prepare_device(kind: Literal["cpu", "cuda"]) -> torch.device:
    """The device to train on. On a GPU, kernels whose result depends on timing are turned off.

    Raises:
        UserError: a GPU is asked for and PyTorch sees none.
    """
    if kind == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    # cuBLAS reads this when it is first used; without it its results may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not torch.cuda.is_available():
        raise UserError(
            "PyTorch sees no CUDA device in this process",
            field="resources.device",
            value=kind,
            mend="set resources.device=cpu and resources.gpus=0, or run where there is a GPU",
        )
    torch.use_deterministic_algorithms(True)
    return torch.device("cuda", torch.cuda.current_device())
