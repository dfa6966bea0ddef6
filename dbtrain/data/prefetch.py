"""The next batch is made on a thread while this one is trained on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from dbtrain.data.loader import BatchLoader


class PrefetchingLoader:
    """Gives what the loader gives, sooner: a batch depends on its step alone, not on when or where it is made."""

    def __init__(self, loader: BatchLoader):
        self._loader = loader
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def prefetch(self, step: int) -> None:
        """Begin with the batch of `step`, in place of one that was begun with and not asked for.

        The best time is just before a call that leaves the interpreter to other threads for long: the backward pass.
        """
        self._next = step, self._thread.submit(self._loader.batch, step)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of any step, as `BatchLoader.batch`; raises what went wrong while it was made."""
        begun, self._next = self._next, None
        if begun is not None and begun[0] == step:
            return begun[1].result()
        return self._loader.batch(step)

    def rows(self, step: int) -> tuple[int, ...]:
        """Numbers of the step's rows, as `BatchLoader.rows`."""
        return self._loader.rows(step)

    def close(self) -> None:
        """End the thread. What it has made or failed to make is given up. May be called again."""
        self._next = None
        self._thread.shutdown(cancel_futures=True)
