"""Everything random is a function of (seed, block, step, replica): the keys all random numbers come from.

Two primitives, both stateless:

* `derive_key` hashes a seed and a list of names and integers to 64 bits, to seed a `torch.Generator`.
* `keyed_uniform` gives the k-th uniform number of sample position p without drawing those before it
  (a counter-based generator built on the SplitMix64 finaliser; Steele, Lea, Flood 2014).

Because no generator carries state from one step to the next, resuming at a step needs the step alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(seed: int, *path: str | int) -> int:
    """A 63-bit key for `path` under `seed`; different paths give independent keys.

    The parts are length-prefixed, so that ("a", "bc") and ("ab", "c") differ, and an integer differs from its text.
    """
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(16, "little", signed=True))
    for part in path:
        data = part.encode() if isinstance(part, str) else part.to_bytes(16, "little", signed=True)
        digest.update(b"s" if isinstance(part, str) else b"i")
        digest.update(len(data).to_bytes(4, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little") >> 1


def step_key(seed: int, stream: str, *, block: int, step: int, replica: int = 0) -> int:
    """The key of one random `stream` ("noise", "dropout", ...) at one step of one replica of one block."""
    return derive_key(seed, stream, block, step, replica)


def generator(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded with `key`."""
    return torch.Generator(device=device).manual_seed(key)


@contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Inside, PyTorch's own random numbers on the CPU and on `device` come from `key`; after it all is as before."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # What `torch.manual_seed` does, without its round of all kinds of accelerators, which takes 0.1 ms.
        torch.default_generator.manual_seed(key)
        for gpu in gpus:
            torch.cuda.default_generators[gpu.index].manual_seed(key)
        yield


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The SplitMix64 finaliser: a bijection of 64-bit integers whose output bits look independent."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def keyed_uniform(key: int, positions: npt.NDArray[np.int64], lanes: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), shape (len(positions), lanes), each a function of (key, position, lane) alone."""
    rows = mix64(positions.astype(np.uint64) ^ np.uint64(key))
    with np.errstate(over="ignore"):
        counters = rows[:, None] + np.arange(lanes, dtype=np.uint64)[None, :] * _GOLDEN
    bits: npt.NDArray[np.float64] = (mix64(counters) >> np.uint64(11)).astype(np.float64)
    return bits * (1.0 / (1 << 53))


def keyed_normal(key: int, positions: npt.NDArray[np.int64], lanes: int) -> torch.Tensor:
    """Standard normal numbers, float32 (len(positions), lanes) on the CPU, from those of `keyed_uniform`."""
    uniform = torch.from_numpy(keyed_uniform(key, positions, lanes))
    normal: torch.Tensor = torch.special.ndtri(uniform.clamp_(min=2.0**-54))
    return normal.float()
