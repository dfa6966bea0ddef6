"""Exported models: a Hugging Face Llama that says what the network, or the blocks' clean path, says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_checkpoints import SECTION, make_llama, random_rows, save_llama, shifted
from safetensors import safe_open
from safetensors.torch import load_file
from small_families import raw_config
from small_runs import start_run, train_all
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import dbtrain
from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.export import Exported, export
from dbtrain.assembly.loading import AssembledModel, load_model
from dbtrain.config_file import parse_config
from dbtrain.data.prepare import prepare
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.runs import model_of
from dbtrain.models import family_of
from dbtrain.models.causal_lm import CausalLM, CausalLMBlock
from dbtrain.plan import Kind
from dbtrain.run_directory import RunDirectory

TRAINED: dict[str, Any] = {"training": {"steps": 6}, "optimiser": {"lr": 1e-2}, "ema": {"half_life": 0}}
# AdamW moves a weight by at most about lr a step, and no weight of a checkpoint is so small that this would change it.
UNTOUCHED: dict[str, Any] = {"training": {"steps": 1}, "optimiser": {"lr": 1e-30}}
TEXTS = ["The lambda form", "x = [1, 2]\n\n\tdef f(x):", "naïve €5 — 日本", " spaces  first", "a"]


def _run(shards: Path, where: Path, kind: Kind = "blocks", **sections: dict[str, Any]) -> RunDirectory:
    """A trained and assembled run; keyword arguments extend sections of its configuration."""
    run = train_all(start_run(parse_config(raw_config("causal_lm", shards, **sections)), where, kind))
    assemble(run)
    return run


def _from(checkpoint: Path, **model: Any) -> dict[str, Any]:
    return {**SECTION, "pretrained": str(checkpoint), **model}


def _load(made: Exported) -> Any:
    """Their network, and that every tensor is in its place."""
    network, found = LlamaForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = Path(made.path, "model.safetensors")
    assert made.bytes == stored.stat().st_size
    assert made.parameters == sum(tensor.numel() for tensor in load_file(stored).values())
    return network.eval()


def _theirs(made: Exported, rows: Tensor) -> Tensor:
    """Logits of the rows' tokens, by what the folder says texts begin with."""
    network = _load(made)
    assert network.config.bos_token_id == network.config.eos_token_id
    with torch.no_grad():
        logits: Tensor = network(shifted(rows, network.config.bos_token_id)).logits
    return logits


def _clean_path(model: AssembledModel, rows: Tensor) -> Tensor:
    """The ordinary forward pass through the layers of all blocks, by our own layers."""
    first, last = model.modules[0], model.modules[-1]
    assert isinstance(first, CausalLMBlock)
    assert isinstance(last, CausalLMBlock)
    x = first.embed_tokens(first.shifted(rows))
    for module in model.modules:
        assert isinstance(module, CausalLMBlock)
        for layer in module.layers:
            x = layer(x, module.rotary(slice(0, rows.shape[1])))
    return last.head(last.norm(x))


@pytest.mark.parametrize(("tied", "tie_head"), [(False, False), (True, False), (True, True)])
def test_an_end_to_end_network(topics: Path, tmp_path: Path, tied: bool, tie_head: bool) -> None:
    network = make_llama(tied=tied)
    section = _from(save_llama(tmp_path / "llama", network), tie_head=tie_head)
    run = _run(topics, tmp_path / "run", "end_to_end", model=section, **TRAINED)
    made = export(model_of(run), tmp_path / "out")
    assert (made.clean_path, made.tokenizer) == (False, False)
    rows, (module,) = random_rows(), load_model(run.uri).modules
    assert isinstance(module, CausalLM)
    said = module(rows)
    torch.testing.assert_close(_theirs(made, rows), said, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(said, network(shifted(rows)).logits, atol=1e-2)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tie_head  # noqa: SIM118 - the file is no mapping


@pytest.mark.parametrize(("tied", "tie_head"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("split", [[2, 1, 1], [4]])
def test_blocks_that_are_still_the_checkpoint(
    topics: Path, tmp_path: Path, split: list[int], tied: bool, tie_head: bool
) -> None:
    network, rows = make_llama(tied=tied), random_rows()
    section = _from(save_llama(tmp_path / "llama", network), tie_head=tie_head)
    cut = {"count": len(split), "split": split}
    made = export(model_of(_run(topics, tmp_path / "run", model=section, blocks=cut, **UNTOUCHED)), tmp_path / "out")
    assert made.clean_path
    loaded = _load(made)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(_theirs(made, rows), network(shifted(rows)).logits)
    # The head of the last block would learn apart from the embedding of the first.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (
        tie_head and len(split) == 1
    )


@pytest.mark.parametrize("tie_head", [False, True])
def test_blocks_that_went_on_with_the_clean_loss(topics: Path, tmp_path: Path, tie_head: bool) -> None:
    network, rows = make_llama(tied=True), random_rows()
    section = _from(save_llama(tmp_path / "llama", network), tie_head=tie_head, clean_loss=1.0)
    run = _run(topics, tmp_path / "run", model=section, blocks={"count": 3, "split": [2, 1, 1]}, **TRAINED)
    said = _clean_path(load_model(run.uri), rows)
    torch.testing.assert_close(_theirs(export(model_of(run), tmp_path / "out"), rows), said, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(said, network(shifted(rows)).logits, atol=1e-2)


def test_one_block_says_on_its_clean_stream_what_is_exported(topics: Path, tmp_path: Path) -> None:
    """The clean stream of training, too, is what goes out."""
    section = _from(save_llama(tmp_path / "llama"), clean_loss=1.0)
    run = _run(topics, tmp_path / "run", model=section, blocks={"count": 1}, **TRAINED)
    rows, (block,) = random_rows(), load_model(run.uri).modules
    assert isinstance(block, CausalLMBlock)
    z = torch.randn(*rows.shape, block.codebook.shape[1], generator=torch.Generator().manual_seed(1))
    said = block(rows, z, torch.ones(len(rows), 1), clean=True)[:, rows.shape[1] :]
    torch.testing.assert_close(_theirs(export(model_of(run), tmp_path / "out"), rows), said, rtol=1e-5, atol=1e-5)


def test_what_is_exported_can_be_started_from(topics: Path, tmp_path: Path) -> None:
    trained = _run(topics, tmp_path / "run", model=_from(save_llama(tmp_path / "llama")), **TRAINED)
    first = export(model_of(trained), tmp_path / "first")
    again = _run(topics, tmp_path / "again", model=_from(Path(first.path)), **UNTOUCHED)
    second = export(model_of(again), tmp_path / "second")
    before, after = (load_file(Path(made.path, "model.safetensors")) for made in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    about = [Path(made.path, "config.json").read_bytes() for made in (first, second)]
    assert about[0] == about[1]
    embedding = before["model.embed_tokens.weight"]
    codebook = family_of(again.config).codebook(again.config)
    torch.testing.assert_close(codebook, embedding / embedding.norm(dim=1, keepdim=True))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in windows of 32 tokens of a tokenizer trained on it; its separator is the token 0."""
    folder = tmp_path_factory.mktemp("data") / "words"
    prepare("topics", folder, length=32, tokenizer="bpe", vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def of_words(words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Exported]:
    """An end-to-end network on it, and its export."""
    folder = tmp_path_factory.mktemp("runs")
    section = {"vocab_size": 300, "separator": 0}
    run = _run(words, folder / "run", "end_to_end", model=section, **{**TRAINED, "training": {"steps": 40}})
    return run, export(model_of(run), folder / "out")


@pytest.mark.parametrize("reader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_a_tokenizer_encodes_as_ours(of_words: tuple[RunDirectory, Exported], words: Path, reader: Any) -> None:
    made, ours = of_words[1], load_tokenizer(words)
    assert made.tokenizer
    theirs = reader.from_pretrained(made.path)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (ours.separator, ours.separator, 32)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False).input_ids == ids
        # As the network was trained, a text begins with the separator.
        assert theirs(text).input_ids == [ours.separator, *ids]
        assert theirs.decode(ids) == ours.decode(ids) == text
    spelt = "an <|end|> that is none"
    said = theirs(spelt, add_special_tokens=False, split_special_tokens=True).input_ids
    assert said == ours.encode(spelt).tolist()


def test_they_write_what_we_write(of_words: tuple[RunDirectory, Exported]) -> None:
    """Greedy, from a prompt as text: tokenizer, begin token, positions and weights together."""
    run, made = of_words
    generator, tokenizer, network = dbtrain.load(run.uri), AutoTokenizer.from_pretrained(made.path), _load(made)
    assert isinstance(generator, TextGenerator)
    written = set()
    for prompt in TEXTS[:3]:
        asked = tokenizer(prompt, return_tensors="pt")
        said = network.generate(**asked, do_sample=False, max_new_tokens=8, pad_token_id=0)[0]
        theirs = tokenizer.decode(said[asked.input_ids.shape[1] :], skip_special_tokens=True)
        assert theirs == generator.generate(prompt, tokens=8, greedy=True)[0]
        written.add(theirs)
    assert len(written) > 1


def test_text_for_another_run_can_be_cut_by_an_exported_tokenizer(
    of_words: tuple[RunDirectory, Exported], words: Path, tmp_path: Path
) -> None:
    manifest = prepare("topics", tmp_path / "again", length=32, tokenizer=of_words[1].path)
    assert manifest.text is not None
    assert (manifest.text.vocab_size, manifest.text.separator) == (300, 0)
    for split in ("train", "test"):
        (name,) = (path.name for path in words.glob(f"{split}*.arrow"))
        assert (tmp_path / "again" / name).read_bytes() == (words / name).read_bytes()


def test_a_tokenizer_that_begins_texts_otherwise(tmp_path: Path) -> None:
    """As Llama 2's, which puts <s> before a text; networks are trained here with </s> there, which ends documents."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    vocab = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab, [("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    whole = Tokenizer(model)
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    whole.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("ab a €\n" * 400)
    prepare(str(tmp_path / "text.txt"), tmp_path / "shards", length=32, tokenizer=str(tmp_path / "tokenizer.json"))
    section = {"vocab_size": len(tokens), "separator": 2}
    run = _run(tmp_path / "shards", tmp_path / "run", model=section, **UNTOUCHED)
    theirs = AutoTokenizer.from_pretrained(export(model_of(run), tmp_path / "out").path)
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    for text in ("ab a€", "a", "b  a"):
        assert theirs(text).input_ids == [2, *ours.encode(text).tolist()]
        assert theirs(text, text).input_ids == [2, *ours.encode(text).tolist()] * 2


def test_what_the_folder_says(topics: Path, of_words: tuple[RunDirectory, Exported], tmp_path: Path) -> None:
    blocks = _run(topics, tmp_path / "run", model={}, **UNTOUCHED)
    made = export(model_of(blocks), tmp_path / "new" / "out")
    assert sorted(path.name for path in Path(made.path).iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = Path(made.path, "README.md").read_text()
    assert "clean path through 3 blocks" in card
    assert "not the denoising chain" in card
    assert "ids 0 to 255 are the bytes" in card
    assert "begins with the token 256" in card
    assert load_model(blocks.uri).sha256 in card
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert "end to end" in Path(of_words[1].path, "README.md").read_text()
    assert "puts the token 0" in Path(of_words[1].path, "README.md").read_text()
