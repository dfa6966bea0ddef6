"""Models on the Hugging Face hub: fetched into its cache, and put there from an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbtrain.errors import UserError
from dbtrain.hub import PREFIX, is_repository, not_installed, parse_model, quiet, refusal
from dbtrain.model_config import is_registered
from dbtrain.run_directory import TOKENIZER

_PUSH = "--push"


def fetch_model(name: str) -> str:
    """The local folder of the model `hf:owner/name` or `hf:owner/name@revision`.

    Only what a model folder of ours consists of is fetched, config.json first: what is no model of ours stays where it
    is. Offline the cache answers.

    Raises:
        UserError: there is no such model of ours, it is not open to the user, or neither hub nor cache has it.
    """
    repository, revision = parse_model(name)
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise not_installed("huggingface_hub", "path", name) from None
    try:
        with quiet():
            first = Path(hf_hub_download(repository, "config.json", revision=revision))
            section = _model_section(first, name)
            # The commit that the configuration is of, whatever is pushed meanwhile.
            for file in ("model.safetensors", *([TOKENIZER] if "vocab_size" in section else [])):
                hf_hub_download(repository, file, revision=first.parent.name)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise refusal(error, "path", name) from None
        raise _no_model(name) from None
    except UserError:
        raise
    except Exception as error:  # whatever the library says of network, rights and cache
        raise refusal(error, "path", name) from None
    return str(first.parent)


def _model_section(config: Path, name: str) -> dict[str, Any]:
    """The section `model` of the configuration in a config.json of ours."""
    try:
        section = json.loads(config.read_bytes())["config"]["model"]
    except (ValueError, KeyError, TypeError):
        section = None
    if not isinstance(section, dict) or not isinstance(section.get("family"), str):
        raise _no_model(name)
    if not is_registered(section["family"]):  # reading the configuration would import it
        raise UserError(
            f"is of the family {section['family']!r}, and no module is imported because a file of the hub names it",
            field="path",
            value=name,
            mend=f"import it yourself before, or `hf download {name.removeprefix(PREFIX).partition('@')[0]} --local-dir"
            " FOLDER` and load FOLDER, if you trust it",
        )
    return section


def _no_model(name: str) -> UserError:
    mend = "name one that `dbtrain export --format dbtrain --push` has put there"
    return UserError("is on the hub, but no model of dbtrain", field="path", value=name, mend=mend)


def check_push(repository: str) -> None:
    """Refuse what cannot be pushed, before anything is written.

    Raises:
        UserError: it is no name of a repository, the library is not installed, or there is no token.
    """
    if not is_repository(repository):
        mend = "write owner/name, without hf:" if repository.startswith(PREFIX) else "write owner/name"
        raise UserError("is no name of a repository on the hub", field=_PUSH, value=repository, mend=mend)
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise not_installed("huggingface_hub", _PUSH, repository) from None
    if not get_token():
        raise UserError(
            "needs a token of the hub, and there is none",
            field=_PUSH,
            value=repository,
            mend="log in with `hf auth login`, or set HF_TOKEN",
        )


def push(folder: str, repository: str, *, private: bool = False) -> str:
    """Upload an exported folder as one commit, and return the commit's address.

    The repository is made if there is none; one that is there keeps its other files.

    Raises:
        UserError: the hub cannot be reached or refuses, or it shows to all what was to be private.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dbtrain")
    again = f"hf upload {repository} {folder}{' --private' if private else ''}"
    with _refusing(repository, again), quiet():
        # Without a wish the owner's own default decides.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(
                "is there already and open to all",
                field=_PUSH,
                value=repository,
                mend="choose another name, leave out --private, or close it on its page",
            )
        # A tokenizer of what was there before would be taken for this model's.
        stale = [name for name in (TOKENIZER, "tokenizer_config.json") if not Path(folder, name).exists()]
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of dbtrain", delete_patterns=stale or None
        )
    return str(commit.commit_url)


@contextmanager
def _refusing(repository: str, again: str) -> Iterator[None]:
    """Whatever the hub says, with the way on: the folder is there, and the command `again` sends it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the library says of network and rights
        said = refusal(error, _PUSH, repository, sending=True)
        way = f"`{again}` sends the exported folder, which is complete"
        mend = way if said.mend is None else f"{said.mend}; then {way}"
        raise UserError(said.problem, field=_PUSH, value=repository, mend=mend) from None
