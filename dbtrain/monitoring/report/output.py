"""Where a report goes: into its run directory, or into a file that the user names."""

from __future__ import annotations

import os
from pathlib import Path

from dbtrain.errors import UserError
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import Storage

FILE = "report.html"


def check_target(path: Path) -> None:
    """Whether a file may be written there, before there is one.

    Raises:
        UserError: it is a folder, or its folder is not there or takes no files.
    """
    where = path.expanduser()
    if where.is_dir():
        raise UserError("is a folder", field="--out", value=path, mend=f"name a file, such as {path / FILE}")
    folder = where.absolute().parent
    if not folder.is_dir():
        raise UserError("cannot be written: its folder is not there", field="--out", value=path, mend="make the folder")
    if not os.access(folder, os.W_OK):
        raise UserError("cannot be written: its folder takes no files", field="--out", value=path, mend="name another")


def write_report(run: RunDirectory, page: bytes, path: Path | None = None) -> str:
    """Write the page into `path`, or as report.html into the run directory, whole or not at all; returns where it is.

    Raises:
        UserError: it cannot be written.
    """
    where = None if path is None else path.expanduser().absolute()
    storage, name = (run.storage, FILE) if where is None else (Storage.open(where.parent), where.name)
    try:
        storage.write_atomic(name, page)
    except UserError as error:
        if path is not None:
            raise UserError(error.problem, field="--out", value=path, mend=error.mend) from None
        raise UserError(error.problem, field="RUN", value=run.uri, mend=f"{error.mend}: --out FILE") from None
    return run.storage.sub(FILE).uri if path is None else str(path)
