"""A worker's memory: what it has held, how a lack of it is told from other errors, and what helps."""

from __future__ import annotations

import errno
import resource
import sys

import torch

from dbtrain.config import RunConfig
from dbtrain.plan import Plan, human_bytes

_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What PyTorch says in plain RuntimeErrors: its allocator on the CPU, and CUDA outside its allocator there."""


def peak_memory(device: torch.device) -> int:
    """Bytes held at once, at most: on a GPU by tensors, on the CPU by the whole process with all it has loaded."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def oom_advice(config: RunConfig, plan: Plan, index: int) -> str:
    """One sentence for whom block `index` has run out of memory, or was killed for it: what it needs, what helps.

    Allocates next to nothing.
    """
    need = plan.blocks[index].bytes
    training, micro_batch = config.training, plan.batch_size // config.training.accumulate
    ways = []
    if (parts := _more_parts(config)) is not None:
        less = human_bytes(need.activations * training.accumulate // parts)
        ways.append(f"training.accumulate={parts}, which makes the activations {less}")
    if not training.recompute:
        ways.append("training.recompute=true")
    if plan.kind == "blocks" and len(plan.blocks) < config.model.depth:
        more = f"blocks.count above {len(plan.blocks)}"
        ways.append(f"{more}: `dbtrain plan CONFIG --memory SIZE` tells which count fits")
    larger = "go on with this one on a larger device"
    mend = f"start a new run with {', or '.join(ways)}; or {larger}" if ways else larger
    return (
        f"block {index} ran out of memory: by the plan it needs {human_bytes(need.total)} beside the program itself, "
        f"{human_bytes(need.activations)} of them for activations of {micro_batch} samples at a time ({mend})"
    )


def _more_parts(config: RunConfig) -> int | None:
    """The next number of parts that a batch can be cut into."""
    share = config.training.batch_size // config.resources.replicas
    more = (parts for parts in range(config.training.accumulate + 1, share + 1) if share % parts == 0)
    return next(more, None)
