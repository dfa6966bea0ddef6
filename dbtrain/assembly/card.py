"""The model card: what a model is, what it was made from, how good it is, and how it is loaded.

An exported model's card begins with the metadata that the Hugging Face hub reads (YAML between two lines of dashes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from dbtrain.config import RunConfig
from dbtrain.data.node_cache import read_manifest
from dbtrain.errors import UserError
from dbtrain.models import Task, family_of
from dbtrain.plan import Plan

if TYPE_CHECKING:
    from dbtrain.assembly.assemble import Weights
    from dbtrain.assembly.loading import AssembledModel
    from dbtrain.inference.evaluation import Evaluation

_USE: dict[Task, str] = {
    "classify": 'print(model.predict(["image.png"]))',
    "generate_images": "images = model.sample(16)",
    "generate_text": 'print(model.generate(["The "], tokens=100))',
    "unmask_text": "print(model.generate())",
}
_PIPELINES: dict[Task, str] = {
    "classify": "image-classification",
    "generate_images": "unconditional-image-generation",
    "generate_text": "text-generation",
    "unmask_text": "text-generation",
}
"""What the hub calls the tasks."""
_FOLDER = "path/to/this/folder"


@dataclass(frozen=True)
class Beside:
    """What a card says that the model itself does not know."""

    evaluation: Evaluation | None = None
    license: str | None = None
    """Identifier such as `apache-2.0`; the card names none when None."""
    address: str | None = None
    """Where the model will be loaded from, such as `hf:owner/name`."""


def run_card(config: RunConfig, plan: Plan, weights: Weights, steps: tuple[int, ...], sha256: str) -> str:
    """The card of the model in a run directory."""
    return (
        f"# {config.name}\n\n{_what(config, plan)}\n\n"
        f"- weights: {_trained(plan, weights, steps)}\n"
        f"- seed: {config.seed}\n"
        f"- SHA-256 of model.safetensors: `{sha256}`\n\n"
        f"{_use(config, _FOLDER)}"
    )


def dbtrain_card(
    model: AssembledModel,
    config: RunConfig,
    beside: Beside,
) -> str:
    """The card of an export in our own format; `config` is the model's configuration as others may see it."""
    source = _hub_source(model)
    front = _front(model, "dbtrain", model.config.model.family, beside.license, source, beside.evaluation)
    return (
        f"{front}# {config.name}\n\n{_what(config, model.plan)}\n\n"
        f"{_facts(model, source)}- SHA-256 of model.safetensors: `{model.sha256}`\n\n"
        f"{_figures(beside.evaluation)}## Use\n\n{_use(config, beside.address or _FOLDER)}\n{_recipe(config)}"
    )


def llama_card(model: AssembledModel, config: RunConfig, beside: Beside, about: str) -> str:
    """The card of a Llama; `about` says what it is. Figures of a chain say nothing of its clean path, and stay away."""
    measured = beside.evaluation if model.end_to_end else None
    source = _hub_source(model)
    front = _front(model, "transformers", "llama", beside.license, source, measured)
    where = (beside.address or _FOLDER).removeprefix("hf:")
    use = (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{where}")\n```\n'
    )
    return (
        f"{front}# {config.name}\n\n{about}\n\n"
        f"{_facts(model, source)}- SHA-256 of the model.safetensors it was made from: `{model.sha256}`\n\n"
        f"{_figures(measured) if model.end_to_end else ''}## Use\n\n{use}\n{_recipe(config)}"
    )


def _front(
    model: AssembledModel,
    library: str,
    kind: str,
    license: str | None,
    source: str | None,
    evaluation: Evaluation | None,
) -> str:
    """The metadata: what is not known is not there."""
    task = _PIPELINES[family_of(model.config).task]
    values: dict[str, Any] = {} if license is None else {"license": license}
    values |= {"library_name": library, "pipeline_tag": task, "tags": ["dbtrain", kind]}
    if source is not None:
        values["datasets"] = [source]
    if evaluation is not None:
        metric = evaluation.metric
        data = model.config.data.source
        result = {
            "task": {"type": task},
            "dataset": {"name": data, "type": source or data, "split": evaluation.split},
            "metrics": [{"type": metric.name, "name": metric.title, "value": float(metric.show(evaluation.value))}],
        }
        values["model-index"] = [{"name": model.config.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n"


def _hub_source(model: AssembledModel) -> str | None:
    """`owner/name` if the shards were prepared from the hub and are still at hand."""
    data, facts = model.config.data, model.plan.data
    if data.remote or facts is None:
        return None
    try:
        manifest = read_manifest(data)
    except UserError:
        return None
    found = re.match(r"hf:([\w.-]+/[\w.-]+)(?=[:\s]|$)", manifest.source)
    return found[1] if found is not None and manifest.facts().sha256 == facts.sha256 else None


def _what(config: RunConfig, plan: Plan) -> str:
    what = (
        f"{len(plan.blocks)} independently trained denoising blocks, {config.model.depth} layers in all"
        if plan.kind == "blocks"
        else f"the end-to-end network, {config.model.depth} layers"
    )
    return f"A {config.model.family} model trained by dbtrain: {what}."


def _trained(plan: Plan, weights: Weights, steps: tuple[int, ...]) -> str:
    kept = "exponential moving average" if weights == "ema" else "last step"
    trained = f"{plan.steps} steps"
    if min(steps) < plan.steps:
        trained = f"{', '.join(map(str, steps))} of {plan.steps} steps (training goes on)"
    return f"{kept} after {trained} of {plan.batch_size} samples a block"


def _facts(model: AssembledModel, source: str | None) -> str:
    config, plan, data = model.config, model.plan, model.plan.data
    assert data is not None  # only a dry run knows no data
    shape = "x".join(map(str, data.shape)) if data.kind != "text" else f"{data.shape[0]} tokens"
    name = config.data.source if source is None else f"[{config.data.source}](https://huggingface.co/datasets/{source})"
    parameters = sum(block.parameters for block in plan.blocks)
    return (
        f"- data: {name}, {data.train_rows:,} training rows of {shape}; digest of the shards `{data.sha256}`\n"
        f"- weights: {_trained(plan, model.weights, model.steps)}; {parameters:,} parameters\n"
        f"- seed: {config.seed}\n"
    )


def _figures(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "## Figures\n\nNone: it had not been evaluated when it was exported.\n\n"
    metric = evaluation.metric
    rows = "".join(
        f"| {name}{' (in use)' if name == evaluation.predict and len(evaluation.readouts) > 1 else ''} "
        f"| {metric.show(value)} |\n"
        for name, value in evaluation.readouts.items()
    )
    return (
        f"## Figures\n\nOn {evaluation.rows:,} {evaluation.split} rows; {metric.better} is better.\n\n"
        f"| read-out | {metric.title} |\n|---|---|\n{rows}\n"
    )


def _use(config: RunConfig, where: str) -> str:
    load = f'```python\nimport dbtrain\n\nmodel = dbtrain.load("{where}")\n'
    return f"{load}{_USE[family_of(config).task]}\n```\n"


def _recipe(config: RunConfig) -> str:
    return f"## Recipe\n\n```yaml\n{config.to_yaml()}```\n"
