"""Models pushed to a hub and loaded from it, and what can go wrong on the way."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer, commit_of, go_offline
from small_runs import start_run, train_all

import dbtrain
from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.export import export
from dbtrain.assembly.hub import check_push, push
from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.inference.runs import model_at, model_of
from dbtrain.run_directory import RunDirectory


def exported(config: RunConfig, where: Path, form: Any = "dbtrain") -> Path:
    """A trained model as a folder."""
    run: RunDirectory = train_all(start_run(config, where / "run"))
    assemble(run)
    return Path(export(model_of(run), where / "out", form).path)


@pytest.fixture(scope="module")
def folder(family_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported ViT; nobody writes there."""
    return exported(family_config("vit", training={"steps": 1}), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def texts(family_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported masked language model, which has a tokenizer; nobody writes there."""
    return exported(family_config("masked_lm", training={"steps": 1}), tmp_path_factory.mktemp("masked"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The hub, and a token for the repositories of `me`."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_pushed_and_loaded(logged_in: HubServer, folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = logged_in
    url = push(str(folder), "me/vit")
    assert hub.files("models", "me/vit") == contents(folder)
    commit = commit_of(contents(folder))
    assert url == f"{hub.url}/me/vit/commit/{commit}"
    monkeypatch.delenv("HF_TOKEN")
    for name in ("hf:me/vit", "hf:me/vit@main", f"hf:me/vit@{commit}"):
        assert model_at(name).sha256 == model_at(str(folder)).sha256
    assert not [asked for asked in hub.asked if asked.startswith("GET") and asked.endswith("README.md")]
    # With the tokenizer, where there is one.
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(str(texts), "me/masked")
    ours, theirs = dbtrain.load(str(texts)), dbtrain.load("hf:me/masked")
    assert ours.model.tokenizer == theirs.model.tokenizer is not None
    hub.vanish(monkeypatch)
    assert model_at("hf:me/masked").sha256 == ours.model.sha256
    go_offline(monkeypatch)
    assert model_at("hf:me/masked").tokenizer == ours.model.tokenizer
    assert model_at("hf:me/vit").tokenizer is None
    with pytest.raises(UserError, match=r"hf:me/other'.* not in the cache, and the library was told to stay offline"):
        model_at("hf:me/other")


def test_pushed_over_another(logged_in: HubServer, folder: Path, texts: Path) -> None:
    """The repository keeps what is not ours; a tokenizer that is not this model's goes."""
    push(str(texts), "me/model")
    (logged_in.repository("models", "me/model") / "NOTES.md").write_text("mine")
    push(str(folder), "me/model")
    assert logged_in.files("models", "me/model") == {**contents(folder), "NOTES.md": b"mine"}
    assert model_at("hf:me/model").tokenizer is None


def test_private(logged_in: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(str(folder), "me/secret", private=True)
    assert model_at("hf:me/secret").sha256 == model_at(str(folder)).sha256
    push(str(folder), "me/open")
    before = len(logged_in.asked)
    with pytest.raises(UserError, match="--push = 'me/open': is there already and open to all"):
        push(str(folder), "me/open", private=True)
    assert not [asked for asked in logged_in.asked[before:] if "commit" in asked or "preupload" in asked]
    push(str(folder), "me/hidden", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="path = 'hf:me/hidden': is not on the hub, or not open to you"):
        model_at("hf:me/hidden")


def test_what_stops_a_push(logged_in: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(repository: str) -> str:
        with pytest.raises(UserError) as refused:
            push(str(folder), repository)
        assert "\n" not in str(refused.value)
        assert f"`hf upload {repository} {folder}` sends the exported folder" in str(refused.value)
        return str(refused.value)

    assert "--push = 'you/vit': is refused: the token has no right to it (403)" in said("you/vit")
    monkeypatch.setenv("HF_TOKEN", "hf_a_wrong_token")
    assert "is refused: the hub does not know the token (401) (log in with" in said("me/vit")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    logged_in.vanish(monkeypatch)
    assert f"{logged_in.url} does not answer (check the network" in said("me/vit")
    with pytest.raises(UserError, match=f"`hf upload me/vit {folder} --private`"):  # not for all to see after all
        push(str(folder), "me/vit", private=True)
    go_offline(monkeypatch)
    assert "cannot be sent, and the library was told to stay offline (unset HF_HUB_OFFLINE" in said("me/vit")


def test_what_is_known_before(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs a token of the hub, and there is none"):
        check_push("me/vit")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push("me/vit")
    for name in ("vit", "me/vit/1", "hf:me/vit", "me/v--it", "https://huggingface.co/me/vit", "me/vit.git", ""):
        with pytest.raises(UserError, match=r"--push = '.*': is no name of a repository on the hub"):
            check_push(name)
    assert hub.asked == []


def test_what_is_no_model_of_ours(hub: HubServer, folder: Path) -> None:
    """Of a foreign model, however large, the configuration alone is fetched."""

    def said(name: str) -> str:
        with pytest.raises(UserError) as refused:
            model_at(name)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    root = hub.repository("models", "me/gpt")
    root.mkdir(parents=True)
    (root / "model.safetensors").write_bytes(b"large")
    assert "'hf:me/gpt': is on the hub, but no model of dbtrain" in said("hf:me/gpt")
    for config in ("{}", "[]", "no JSON", json.dumps({"config": {"model": "gpt2"}})):
        (root / "config.json").write_text(config)
        assert "'hf:me/gpt': is on the hub, but no model of dbtrain" in said("hf:me/gpt")
    assert not [asked for asked in hub.asked if "safetensors" in asked]
    assert "has no such revision" in said("hf:me/gpt@v2")
    (hub.repository("models", "me/llama")).mkdir()
    hub.gated.add("me/llama")
    assert "is gated" in said("hf:me/llama")
    for name in ("hf:gpt2", "hf:./folder", "hf:me/gpt@", "hf:"):
        assert "is no model of the hub" in said(name)
    # One of ours that was tampered with is found out, under the name that was asked for.
    torn = hub.repository("models", "me/torn")
    torn.mkdir()
    for file, data in contents(folder).items():
        (torn / file).write_bytes(data)
    (torn / "model.safetensors").write_bytes(b"torn")
    assert said("hf:me/torn") == "path = 'hf:me/torn': model.safetensors is not the file that config.json describes"


def test_no_module_is_imported_for_a_model_of_the_hub(hub: HubServer, folder: Path) -> None:
    """Families of one's own are modules, which reading a configuration imports; a stranger's file names none."""
    root = hub.repository("models", "me/odd")
    root.mkdir(parents=True)
    about = json.loads((folder / "config.json").read_text())
    about["config"]["model"]["family"] = "this"  # whose import prints a poem
    (root / "config.json").write_text(json.dumps(about))
    (root / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    sys.modules.pop("this", None)
    with pytest.raises(UserError, match=r"is of the family 'this', and no module is imported.*hf download me/odd"):
        model_at("hf:me/odd@main")
    assert "this" not in sys.modules


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for ask in (model_at, lambda name: check_push(name.removeprefix("hf:"))):
        with pytest.raises(UserError, match=r"needs the library 'huggingface_hub'.*pip install 'dbtrain\[hf\]'"):
            ask("hf:me/vit")
