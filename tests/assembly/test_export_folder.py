"""Models of every family as folders in our own format, and what their cards say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from small_families import MODELS
from small_runs import start_run, train_all

import dbtrain
from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.card import Beside
from dbtrain.assembly.export import export
from dbtrain.assembly.loading import load_model
from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.data.manifest import MANIFEST_FILE
from dbtrain.inference.evaluation import ACCURACY, Evaluation
from dbtrain.inference.runs import evaluation_at, evaluation_of, model_of
from dbtrain.run_directory import RunDirectory

FamilyConfig = Callable[..., RunConfig]
FIGURES = Evaluation("blocks", "test", 359, ACCURACY, {"first": 0.5, "product": 0.62345}, "product")


def finished_run(config: RunConfig, where: Path, kind: Any = "blocks") -> RunDirectory:
    run = train_all(start_run(config, where, kind))
    assemble(run)
    return run


@pytest.fixture(scope="module")
def classifier(family_config: FamilyConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A trained ViT on digits; nobody writes there."""
    return finished_run(family_config("vit", training={"steps": 2}), tmp_path_factory.mktemp("runs") / "vit")


@pytest.mark.parametrize(("family", "kind"), [*((family, "blocks") for family in MODELS), ("vit", "end_to_end")])
def test_every_family(family_config: FamilyConfig, tmp_path: Path, family: str, kind: Any) -> None:
    run = finished_run(family_config(family, training={"steps": 1}), tmp_path / "run", kind)
    model = model_of(run)
    made = export(model, tmp_path / "out", "dbtrain")
    # The very file of the run's model: weights, their names and their order.
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == run.storage.read_bytes("model/model.safetensors")
    assert (made.format, made.sha256, made.weights, made.clean_path) == ("dbtrain", model.sha256, "ema", False)
    assert made.parameters == sum(block.parameters for block in run.plan.blocks)
    again = load_model(made.path)
    assert (again.plan, again.steps, again.weights, again.tokenizer) == (
        (model.plan, model.steps, model.weights, model.tokenizer)
    )
    assert made.tokenizer == (model.tokenizer is not None)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "dbtrain"
    assert card.data.tags == ["dbtrain", family]
    assert card.data.license is None
    assert "None: it had not been evaluated" in card.text
    # The program of the card, but for its last line, which wants a file or takes long.
    program = card.text.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", made.path)
    names: dict[str, Any] = {}
    exec("\n".join(program.splitlines()[:-1]), names)
    assert type(names["model"]) is type(dbtrain.load(run.uri))


def test_the_default_is_a_llama_where_there_is_one(family_config: FamilyConfig, tmp_path: Path) -> None:
    formats = {}
    for family in ("causal_lm", "masked_lm"):
        run = finished_run(family_config(family, training={"steps": 1}), tmp_path / family)
        made = export(model_of(run), tmp_path / "out" / family)
        formats[family] = made.format
        assert ModelCard.load(Path(made.path, "README.md")).data.pipeline_tag == "text-generation"
    assert formats == {"causal_lm": "llama", "masked_lm": "dbtrain"}
    llama = ModelCard.load(tmp_path / "out" / "causal_lm" / "README.md")
    assert (llama.data.library_name, llama.data.tags) == ("transformers", ["dbtrain", "llama"])


def test_figures_on_the_card(classifier: RunDirectory, tmp_path: Path) -> None:
    export(model_of(classifier), tmp_path / "out", beside=Beside(FIGURES, "mit", "hf:me/vit"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("image-classification", "digits", "test")
    assert (result.metric_type, result.metric_name, result.metric_value) == ("accuracy", "accuracy, %", 62.34)
    assert card.data.model_name == classifier.config.name
    assert "On 359 test rows; higher is better." in card.text
    assert "| product (in use) | 62.34 |\n" in card.text
    assert 'dbtrain.load("hf:me/vit")' in card.text
    assert "weights: exponential moving average after 2 steps" in card.text
    assert f"`{load_model(classifier.uri).sha256}`" in card.text


def test_which_weights(family_config: FamilyConfig, tmp_path: Path) -> None:
    run = finished_run(family_config("vit", training={"steps": 2}), tmp_path / "run")
    assemble(run, "raw")
    made = export(model_of(run), tmp_path / "out")
    assert (made.weights, json.loads((tmp_path / "out" / "config.json").read_text())["weights"]) == ("raw", "raw")
    assert "weights: last step after 2 steps" in (tmp_path / "out" / "README.md").read_text()


def test_the_figures_of_a_chain_are_not_those_of_its_clean_path(family_config: FamilyConfig, tmp_path: Path) -> None:
    config = family_config("causal_lm", training={"steps": 1})
    for kind, known in (("blocks", False), ("end_to_end", True)):
        run = finished_run(config, tmp_path / kind, kind)
        export(model_of(run), tmp_path / "out" / kind, "llama", Beside(FIGURES))
        card = ModelCard.load(tmp_path / "out" / kind / "README.md")
        assert (card.data.eval_results is not None, "62.34" in card.text) == (known, known)


def test_an_evaluation_is_remembered(classifier: RunDirectory, digits: Path) -> None:
    model = model_of(classifier)
    assert evaluation_at(classifier.uri, model) is None
    measured = evaluation_of(classifier, data=str(digits))
    assert evaluation_at(classifier.uri, model) == measured
    assert evaluation_at(f"{classifier.uri}/model", model) is None
    assemble(classifier, "raw")  # whose figures are others
    assert evaluation_at(classifier.uri, model_of(classifier)) is None
    assemble(classifier)


def test_nothing_tells_of_the_machine(family_config: FamilyConfig, tmp_path: Path) -> None:
    """Where data and cache lie, and whom the run told, is nobody's business; what the run was is all there."""
    cache, told = tmp_path / "cache", {"wandb_entity": "somebody"}
    config = family_config("vit", training={"steps": 1}, data={"cache": str(cache)}, monitoring=told)
    run = finished_run(config, tmp_path / "run")
    export(model_of(run), tmp_path / "out")
    for name in ("README.md", "config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "/" not in text.replace("path/to/this/folder", "")
        assert "somebody" not in text
    recipe = yaml.safe_load((tmp_path / "out" / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0])
    assert parse_config(recipe).identity() == run.config.identity()
    assert load_model(str(tmp_path / "out")).config.digest() == run.plan.config_sha256


SOURCES = {
    "hf:me/bugs:train": ["me/bugs"],
    "hf:me/bugs --subset small": ["me/bugs"],
    "hf:/home/me/bugs": None,
    "/home/me/bugs": None,
    "digits": None,
}


def test_data_of_the_hub(family_config: FamilyConfig, digits: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(digits, tmp_path / "shards"))
    manifest = json.loads((shards / MANIFEST_FILE).read_text())
    data = {"source": "bugs", "path": str(shards)}
    config = family_config("vit", training={"steps": 1}, data=data)
    model = model_of(finished_run(config, tmp_path / "run", "end_to_end"))
    for index, (source, known) in enumerate(SOURCES.items()):
        (shards / MANIFEST_FILE).write_text(json.dumps({**manifest, "source": source}))
        card = ModelCard.load(Path(export(model, tmp_path / str(index)).path, "README.md"))
        assert card.data.datasets == known, source
        assert "/home/me" not in str(card)
        assert ("[bugs](https://huggingface.co/datasets/me/bugs)" in card.text) == (known is not None)
    (shards / MANIFEST_FILE).unlink()  # the data has moved: then the card does not know
    card = ModelCard.load(Path(export(model, tmp_path / "last").path, "README.md"))
    assert card.data.datasets is None
