"""Tokenizers: every text comes back, deterministic training, refusals with the cure."""

import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from train.config.keys.data import TokenizerConfig
from train.data import text_cuts
from train.data.tokenizer import EOT, Tokenizer, build_tokenizer, encoding_digest, given_tokenizer
from train.errors import UserError

TEXTS = ["def main():\n    return 0\n" * 40, "静夜思：床前明月光，疑是地上霜。" * 30, "the quick brown fox " * 50]


def bpe(vocab_size: int = 400) -> Tokenizer:
    return Tokenizer(build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=vocab_size), TEXTS, ""))


def chars(characters: str) -> Tokenizer:
    return Tokenizer(build_tokenizer(TokenizerConfig(kind="chars"), [], characters))


BPE = bpe()
BYTES = Tokenizer(build_tokenizer(TokenizerConfig(kind="bytes"), [], ""))


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("床前 \n\t明a"))))
@settings(deadline=None)
def test_any_text_is_decoded_exactly(text):
    for made in (BPE, BYTES):
        assert made.decode(made.encode(text)) == text


def test_byte_tokens_are_their_own_ids():
    assert BYTES.encode("aé中\n") == list("aé中\n".encode())
    assert (BYTES.eot, BYTES.vocab_size) == (256, 257)


def test_bpe_learns_words_of_english_and_chinese():
    assert BPE.vocab_size <= 400
    assert BPE.eot == 0
    assert len(BPE.encode("the quick")) < len("the quick")
    assert len(BPE.encode("床前明月光")) < len("床前明月光".encode())


def test_text_that_spells_the_end_token_is_text():
    for made in (BPE, BYTES):
        ids = made.encode(f"a{EOT}b")
        assert made.eot not in ids
        assert made.decode(ids) == f"a{EOT}b"


def test_bpe_is_a_function_of_its_text():
    code = (
        "from train.data.tokenizer import build_tokenizer; from train.config.keys.data import TokenizerConfig;"
        "import hashlib;"
        f"t = build_tokenizer(TokenizerConfig(kind='bpe', vocab_size=400), {TEXTS!r}, '');"
        "print(hashlib.sha256(t.encode()).hexdigest())"
    )
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == BPE.fingerprint


def test_characters_have_sorted_ids_and_are_decoded_exactly():
    made = chars("\n 中abc")
    assert made.encode("cab 中\n") == [5, 3, 4, 1, 2, 0]
    assert made.decode([5, 3, 4, 1, 2, 0]) == "cab 中\n"
    assert (made.vocab_size, made.eot) == (7, 6)


def test_unknown_character_is_named():
    with pytest.raises(UserError, match="'x' 'z'"):
        chars("abc").encode("zaxb")


@pytest.mark.parametrize(
    "made", [BPE, BYTES, chars("".join(sorted(set("".join(TEXTS)))))], ids=["bpe", "bytes", "chars"]
)
def test_long_text_is_encoded_in_chunks_without_loss(made, monkeypatch):
    text = "".join(TEXTS)
    whole = made.encode(text)
    pieces = [text[begin : begin + 7] for begin in range(0, len(text), 7)]
    parts = [ids for _, ids in made.encode_pieces(pieces)]
    monkeypatch.setattr(text_cuts.TextCuts.parts, "__defaults__", (1000,))
    small_parts = [ids for _, ids in made.encode_pieces(pieces)]
    assert (len(parts), len(small_parts) > 1) == (1, True)
    assert [*chain(*parts)] == [*chain(*small_parts)] == whole
    assert made.decode(whole) == text


@pytest.mark.parametrize("vocab_size", [None, 256])
def test_bpe_too_small_for_all_bytes_is_refused(vocab_size):
    with pytest.raises(UserError, match="vocab_size=4096"):
        bpe(vocab_size)


def test_given_tokenizer_keeps_its_end_token(tmp_path):
    content = json.loads(build_tokenizer(TokenizerConfig(kind="bytes"), [], ""))
    content["added_tokens"][0]["content"] = "</s>"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert Tokenizer(given_tokenizer(TokenizerConfig(kind="file", path=str(path)))).eot == 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not a tokenizer.json"),
        (None, "No such file"),
        (
            '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
            "no token that ends",
        ),
    ],
)
def test_given_tokenizer_without_an_end_token_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        given_tokenizer(TokenizerConfig(kind="file", path=str(path)))
    assert str(path) in str(caught.value)


def saved(folder: Path, fast: Fast, **changes) -> TokenizerConfig:
    """Settings of a tokenizer.json of ``fast``, some of whose model's entries are changed."""
    values = json.loads(fast.to_str())
    values["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return TokenizerConfig(kind="file", path=str(folder / "tokenizer.json"))


def words_of(*special: str, **keys) -> Fast:
    """A BPE of a, b and ab with special tokens."""
    fast = Fast(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], **keys))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(list(special))
    return fast


def test_dropout_of_a_given_tokenizer_is_switched_off_with_a_note(tmp_path: Path):
    settings, notes = saved(tmp_path, words_of(EOT), dropout=0.5), []
    content = given_tokenizer(settings, notes.append)
    assert "dropout of 0.5" in notes[0]
    assert json.loads(content)["model"]["dropout"] is None
    as_it_was = Tokenizer(Path(settings.path).read_text())  # of a run that began with such a one
    assert {tuple(as_it_was.encode("ab ab ab ab")) for _ in range(20)} == {(2, 2, 2, 2)}
    notes.clear()
    assert given_tokenizer(saved(tmp_path, words_of(EOT)), notes.append) == Path(settings.path).read_text()
    assert notes == []


def test_end_token_is_the_key_else_the_config_beside_else_a_known_one(tmp_path: Path):
    settings = saved(tmp_path, words_of("<|eot_id|>", "<｜end▁of▁sentence｜>"))
    with pytest.raises(UserError, match=r"data\.tokenizer\.end_token"):
        given_tokenizer(settings)
    named = settings.model_copy(update={"end_token": "<｜end▁of▁sentence｜>"})
    assert Tokenizer(given_tokenizer(named)).eot == 4
    with pytest.raises(UserError, match="which data"):
        given_tokenizer(settings.model_copy(update={"end_token": "<end>"}))
    for eos in ("<|eot_id|>", {"__type": "AddedToken", "content": "<|eot_id|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert Tokenizer(given_tokenizer(settings)).eot == 3
    assert Tokenizer(given_tokenizer(named)).eot == 4
    both = saved(tmp_path, words_of("<|end_of_text|>", "<|eot_id|>"))
    marked = Tokenizer(given_tokenizer(both))
    assert (marked.eot, marked.extended(["[CLS]"]).eot) == (4, 4)
    assert encoding_digest(marked.content) == encoding_digest(Path(both.path).read_text())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert given_tokenizer(both) == Path(both.path).read_text()


def test_git_lfs_note_in_the_place_of_a_tokenizer_is_told_from_one(tmp_path: Path):
    (tmp_path / "t.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        given_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "t.json")))


UNIGRAM = Fast(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
UNIGRAM.add_special_tokens([EOT])


@pytest.mark.parametrize(
    ("fast", "text", "unknown"),
    [
        (UNIGRAM, "ab床前明a", 3),
        (words_of(EOT, "[UNK]"), "ab 床前 a", 2),  # it drops what it does not know
        (Fast.from_str(BPE.content), "ab 床前 a", 0),
        (Fast.from_str(BYTES.content), "ab 床前 a", 0),
    ],
    ids=["unigram", "bpe that drops", "byte-level bpe", "bytes"],
)
def test_text_that_a_tokenizer_does_not_know_is_counted(fast: Fast, text: str, unknown: int):
    tokenizer = Tokenizer(fast.to_str())
    assert tokenizer.count_unknown(text, tokenizer.encode(text)) == unknown


def test_vocabulary_without_an_unknown_token_is_refused_in_words():
    fast = Fast(models.WordLevel({"aa": 0}, unk_token="[UNK]"))
    fast.add_special_tokens([EOT])
    with pytest.raises(UserError, match="the tokenizer fails at this text"):
        Tokenizer(fast.to_str()).encode("b")


def test_an_id_beyond_any_vocabulary_is_refused_before_it_takes_memory():
    crafted = json.loads(BYTES.content)
    crafted["model"]["vocab"]["Ā"] = 2**31
    with pytest.raises(UserError, match="numbers its tokens up to 2,147,483,648"):
        Tokenizer(json.dumps(crafted))


def test_file_that_only_the_librarys_lenient_parser_takes_is_refused():
    unigram = (Path(__file__).parents[2] / "fuzz/seeds/unigram.json").read_text()
    lenient = unigram.replace('"version": "1.0"', '"version\ufffd1.0"')
    with pytest.raises(UserError, match=re.escape("not a tokenizer.json")):
        Tokenizer(lenient)
