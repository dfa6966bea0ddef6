"""TensorBoard: one folder of event files a block."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from dbtrain.monitoring.run_view import RunView
from dbtrain.run_directory import RunDirectory

FOLDER = "tensorboard"
"""Of the run directory; `tensorboard --logdir` takes it."""


class TensorBoardSink:
    """Writes scalars, see `dbtrain.monitoring.forward.Sink`."""

    def __init__(self, run: RunDirectory):
        assert run.storage.local_path is not None, "check_sinks refuses other run directories"
        self._folder = run.storage.local_path / FOLDER
        self._writers: dict[int, SummaryWriter] = {}

    def log(self, block: int, step: int, when: float, values: Mapping[str, float]) -> None:
        """One scalar a figure."""
        if block not in self._writers:
            self._writers[block] = SummaryWriter(str(self._folder / f"block-{block:02d}"))
        for name, value in values.items():
            self._writers[block].add_scalar(name, value, step, walltime=when)

    def flush(self) -> None:
        """Write them out."""
        for writer in self._writers.values():
            writer.flush()

    def close(self, view: RunView) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
