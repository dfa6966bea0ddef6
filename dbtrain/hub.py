"""The Hugging Face hub: names of what lies there, and what its library says, as one message.

The library (extra `hf`) is imported where something is asked of the hub, so that nothing else needs it. It finds the
address (HF_ENDPOINT), the token (HF_TOKEN, or a login), the cache (HF_HOME) and the wish to stay offline
(HF_HUB_OFFLINE) by itself.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from dbtrain.errors import UserError

PREFIX = "hf:"
"""What names something on the hub begin with."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Repository(NamedTuple):
    """A model on the hub."""

    name: str
    """`owner/name`."""
    revision: str | None
    """Branch, tag or commit; the default branch when None."""


def on_hub(text: str) -> bool:
    """Whether a place is one on the hub."""
    return text.startswith(PREFIX)


def parse_model(text: str) -> Repository:
    """`hf:owner/name` or `hf:owner/name@revision`.

    Raises:
        UserError: it is neither.
    """
    name, at, revision = text.removeprefix(PREFIX).partition("@")
    if not is_repository(name) or (at and not revision):
        raise UserError(
            "is no model of the hub",
            field="path",
            value=text,
            mend="write hf:owner/name or hf:owner/name@revision; a folder of this machine goes without hf:",
        )
    return Repository(name, revision or None)


def is_repository(name: str) -> bool:
    """Whether the hub would take `name` for `owner/name`."""
    bad = "--" in name or ".." in name or name.endswith((".git", "-", "."))
    return len(name) <= 96 and not bad and _REPOSITORY.fullmatch(name) is not None


def not_installed(library: str, field: str, value: str) -> UserError:
    """That a library of the extra is missing."""
    return UserError(
        f"needs the library {library!r}, which is not installed",
        field=field,
        value=value,
        mend="pip install 'dbtrain[hf]'",
    )


def refusal(error: Exception, field: str, value: str, *, sending: bool = False) -> UserError:
    """What an error of the hub's libraries means to the user, on one line; `sending` when there is no cache to ask."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why it was looked for in the cache alone
    said = " ".join(str(error).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    missing = type(error).__name__ == "DatasetNotFoundError"  # of another library, which keeps no cause
    mend: str | None = None
    if isinstance(error, errors.OfflineModeIsEnabled) or "OfflineModeIsEnabled" in said or "outgoing traffic" in said:
        problem = f"{'cannot be sent' if sending else 'is not in the cache'}, and the library was told to stay offline"
        mend = "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE"
        mend += "" if sending else ", or bring the cache (HF_HOME) from where it was fetched"
    elif isinstance(error, errors.GatedRepoError) or (missing and "gated" in said):
        problem, mend = "is gated: its owners choose who may read it", f"ask for access on its page, then {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem, mend = "has no such revision", "its page lists branches, tags and commits"
    elif missing or (isinstance(error, errors.RepositoryNotFoundError) and not sending):
        problem, mend = "is not on the hub, or not open to you", f"check the name; if it is private, {_LOG_IN}"
    elif status == 401:
        problem, mend = "is refused: the hub does not know the token (401)", _LOG_IN
    elif status == 403:
        problem, mend = "is refused: the token has no right to it (403)", "use another token, or another owner"
    elif status is not None:
        problem = f"is refused by the hub ({status}): {said}"
    elif _is_network(error):
        problem = f"{constants.ENDPOINT} does not answer" + ("" if sending else ", and the cache does not have it")
        mend = "check the network, and HF_ENDPOINT if it is set"
    else:
        problem = f"cannot be {'sent' if sending else 'loaded'}: {said or type(error).__name__}"
    return UserError(problem, field=field, value=value, mend=mend)


def _is_network(error: Exception) -> bool:
    """Whether a connection failed; what the library talks HTTP with differs by its version."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(("httpx", "requests"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars of the library are for terminals alone, and its advice for nobody."""
    from huggingface_hub.utils import logging as library
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    level = library.get_verbosity()
    library.set_verbosity(logging.ERROR)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if hide:
            enable_progress_bars()
