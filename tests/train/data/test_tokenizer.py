"""Tokenizers: every text comes back, deterministic training, refusals with the cure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import schema
from train.data.tokenizer import EOT, Tokenizer, build_tokenizer, given_tokenizer
from train.errors import UserError

TEXTS = ["def main():\n    return 0\n" * 40, "静夜思：床前明月光，疑是地上霜。" * 30, "the quick brown fox " * 50]


def bpe(vocab_size: int = 400) -> Tokenizer:
    return Tokenizer(build_tokenizer(schema.TokenizerConfig(kind="bpe", vocab_size=vocab_size), TEXTS, ""))


def chars(characters: str) -> Tokenizer:
    return Tokenizer(build_tokenizer(schema.TokenizerConfig(kind="chars"), [], characters))


BPE = bpe()
BYTES = Tokenizer(build_tokenizer(schema.TokenizerConfig(kind="bytes"), [], ""))


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
        "from train.data.tokenizer import build_tokenizer; from train.config import schema; import hashlib;"
        f"t = build_tokenizer(schema.TokenizerConfig(kind='bpe', vocab_size=400), {TEXTS!r}, '');"
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
    monkeypatch.setattr(made, "_chunk", 100)
    assert made.decode(made.encode(text)) == text
    if made is not BPE:
        assert made.encode(text) == whole


@pytest.mark.parametrize("vocab_size", [None, 256])
def test_bpe_too_small_for_all_bytes_is_refused(vocab_size):
    with pytest.raises(UserError, match="vocab_size=4096"):
        bpe(vocab_size)


def test_given_tokenizer_keeps_its_end_token(tmp_path):
    content = json.loads(build_tokenizer(schema.TokenizerConfig(kind="bytes"), [], ""))
    content["added_tokens"][0]["content"] = "</s>"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert Tokenizer(given_tokenizer(schema.TokenizerConfig(kind="file", path=str(path)))).eot == 256


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
        given_tokenizer(schema.TokenizerConfig(kind="file", path=str(path)))
    assert str(path) in str(caught.value)


def test_an_id_beyond_any_vocabulary_is_refused_before_it_takes_memory():
    crafted = json.loads(BYTES.content)
    crafted["model"]["vocab"]["Ā"] = 2**31
    with pytest.raises(UserError, match="numbers its tokens up to 2,147,483,648"):
        Tokenizer(json.dumps(crafted))
