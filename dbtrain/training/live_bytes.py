"""How much memory tensors take at once, by watching every storage that an operation returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, `peak` is the most bytes alive at once of storages that operations have returned.

    It works on fake tensors as on real ones. What a kernel allocates and frees inside is not seen.
    """

    def __init__(self, apart: Iterable[Tensor] = (), part: Callable[[], int] = lambda: 0):
        """`apart` are tensors that are not counted, when an operation returns them changed or as views; `part` is asked
        for bytes of interest at the moment of the peak, which `part_at_peak` remembers."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = self.part_at_peak = 0
        self._part = part
        self._apart = [tensor.untyped_storage() for tensor in apart]  # held: an address may be used again
        self._known = {storage._cdata: 0 for storage in self._apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known[key] = size
        self.now += size
        if self.now > self.peak:
            self.peak, self.part_at_peak = self.now, self._part()
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
