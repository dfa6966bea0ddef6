from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dbtrain.data.text.documents import topics
from dbtrain.data.text.subword import SubwordTokenizer, train_bpe
from dbtrain.data.text.tokenizer import ByteTokenizer, load_tokenizer
from dbtrain.errors import CorruptData, UserError

# Everything that UTF-8 can encode: no halves of surrogate pairs.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    return train_bpe(topics()[:20], 600)


@pytest.fixture(scope="module")
def llama() -> SubwordTokenizer:
    """As Llama 2's: spaces as U+2581, one in front of every text, bytes where letters are unknown."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁a", "b")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    loaded = load_tokenizer(made.to_str().encode())
    assert isinstance(loaded, SubwordTokenizer)
    return loaded


@given(TEXTS)
def test_bytes_there_and_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert bytes(ids.tolist()) == text.encode()
    assert tokenizer.decode([*ids, tokenizer.separator]) == text


@settings(deadline=None)
@given(text=TEXTS)
def test_bpe_there_and_back(bpe: SubwordTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert b"".join(bpe.token_bytes[index] for index in ids) == text.encode()


@settings(deadline=None)
@given(text=st.text("ab \n€x", max_size=30))
def test_bytes_as_fall_back_there_and_back(llama: SubwordTokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text)) == text


def test_where_spaces_are_letters_of_their_own(llama: SubwordTokenizer) -> None:
    assert llama.encode("ab a€").tolist() == [263, 262, *(3 + value for value in "€".encode())]
    assert llama.token_bytes[263] == b" ab"
    assert llama.token_bytes[llama.separator] == b""
    assert (llama.kind, llama.separator, llama.vocab_size) == ("bpe", 2, 264)


def test_bpe_saves_tokens(bpe: SubwordTokenizer) -> None:
    text = topics()[30]
    assert bpe.vocab_size == 600
    assert len(bpe.encode(text)) < 0.6 * len(text.encode())


def test_names_of_special_tokens_in_a_text_are_text(bpe: SubwordTokenizer) -> None:
    text = "an <|end|> that is none"
    assert bpe.separator not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("limit", [1, 10, 1000])
def test_long_texts_in_parts_give_the_same_ids(bpe: SubwordTokenizer, llama: SubwordTokenizer, limit: int) -> None:
    text = "\n".join(topics()[:10])[:5000] + "  \n\n x_ y " + "€" * 50
    for tokenizer in (ByteTokenizer(), bpe, llama):
        parts = list(tokenizer.encode_pieces(text, limit))
        assert np.array_equal(np.concatenate(parts), tokenizer.encode(text))
        assert len(parts) == 1 if tokenizer is llama else len(parts) > 3


def test_half_a_character_does_not_break_decoding(bpe: SubwordTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode("a€")[:-1]) == "a\ufffd"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_half_of_a_surrogate_pair_has_no_ids(bpe: SubwordTokenizer, kind: str) -> None:
    with pytest.raises(UserError, match="surrogate pair at character 1"):
        (bpe if kind == "bpe" else ByteTokenizer()).encode("a\ud800")


def test_training_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from dbtrain.data.text.subword import train_bpe\n"
        "from dbtrain.data.text.documents import topics\n"
        "print(hashlib.sha256(train_bpe(topics()[:10], 400).to_bytes()).hexdigest())"
    )
    digests = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert len(digests) == 1


def test_a_text_with_few_pairs_gives_a_small_vocabulary() -> None:
    assert train_bpe(["ab ab"], 5000).vocab_size == 259  # bytes, separator, "ab", " ab"


def test_a_vocabulary_without_room_for_all_bytes() -> None:
    with pytest.raises(UserError, match="at least 257") as caught:
        train_bpe(["a"], 256)
    assert caught.value.field == "--vocab-size"


def test_files_are_kept_to_the_byte(bpe: SubwordTokenizer, tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        data = tokenizer.to_bytes()
        (tmp_path / "tokenizer.json").write_bytes(data)
        for source in (data, tmp_path, tmp_path / "tokenizer.json"):
            again = load_tokenizer(source)
            assert type(again) is type(tokenizer)
            assert again.to_bytes() == data
            assert again.token_bytes == tokenizer.token_bytes
            assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, tokenizer.separator)


def test_settings_of_the_file_do_not_cut_or_pad(bpe: SubwordTokenizer) -> None:
    raw = json.loads(bpe.to_bytes())
    raw["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    raw["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|end|>",
    }  # fmt: skip
    assert np.array_equal(load_tokenizer(json.dumps(raw).encode()).encode("one two three"), bpe.encode("one two three"))


@pytest.mark.parametrize(
    ("name", "special"),
    [("</s>", True), ("<|endoftext|>", True), ("<|end_of_text|>", True), ("<eos>", True), ("</s>", False)],
)
def test_which_token_ends_documents(name: str, special: bool) -> None:
    made = Tokenizer(models.BPE({"a": 0, name: 1}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    made.add_tokens([AddedToken(name, special=special)])
    if special:
        assert load_tokenizer(made.to_str().encode()).separator == 1
    else:
        with pytest.raises(UserError, match="no special token that ends a document"):
            load_tokenizer(made.to_str().encode())


def test_a_tokenizer_whose_bytes_are_unknown() -> None:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match="which bytes its tokens stand for"):
        load_tokenizer(made.to_str().encode())


@pytest.mark.parametrize(
    "data", [b"", b"[1]", b"{}", b'{"type": "bytes"}', b'{"model": 3}', b'{"model": {}}', b"\xff\xfe", b'{"a": "\xff"}']
)
def test_files_that_are_no_tokenizers(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(CorruptData, match="is not a tokenizer file") as caught:
        load_tokenizer(path)
    assert caught.value.value == path
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(tmp_path)


def test_without_the_library(bpe: SubwordTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install 'dbtrain"):
        load_tokenizer(bpe.to_bytes())
    assert load_tokenizer(ByteTokenizer().to_bytes()).vocab_size == 257
