"""Parts of a text: joined they are the text, and their tokens are those of the whole, for every kind of tokenizer."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from train.config.keys.data import TokenizerConfig
from train.data.text_cuts import LONGEST_WORD, TextCuts, bounded_words
from train.data.tokenizer import build_tokenizer

UNITS = [
    "the ",
    " quick",
    "don't",
    "'",
    "\n",
    "\n\n",
    " ",
    "\t",
    "a",
    "Z",
    "7",
    "-",
    "_",
    "。\n",
    "床前",
    "明",
    "😀",
    "\u0301",
    "x = 1\n    ",
]
TEXTS = [
    "".join(UNITS) * 3,
    "the quick brown fox don't\n\n" * 30,
    "def f(x):\n    return x - 1\n" * 30,
    "床前明月光。\n" * 30,
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def learned(words: pre_tokenizers.PreTokenizer, normalizer=None, added: str | None = None) -> Fast:
    """A bpe that was learned with these words; long merges, so that a wrong cut shows."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.normalizer = words, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    if added:
        fast.add_tokens([AddedToken(added, special=False)])
    return fast


def unigram(words: pre_tokenizers.PreTokenizer | None, normalizer=None) -> Fast:
    """A unigram model, as SentencePiece's are converted."""
    fast = Fast(models.Unigram())
    if words:
        fast.pre_tokenizer = words
    if normalizer:
        fast.normalizer = normalizer
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    fast.train_from_iterator(TEXTS, trainer)
    return fast


def wordpiece() -> Fast:
    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    fast.train_from_iterator(TEXTS, trainer)
    return fast


def built(kind: str) -> Fast:
    config = TokenizerConfig(kind=kind, vocab_size=600 if kind == "bpe" else None)
    return Fast.from_str(build_tokenizer(config, TEXTS, "".join(sorted(set("".join(UNITS))))))


TOKENIZERS = {
    "bpe": built("bpe"),
    "bytes": built("bytes"),
    "chars": built("chars"),
    "gpt2": learned(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2 with a blank before": learned(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt2 with an added token of blanks": learned(pre_tokenizers.ByteLevel(add_prefix_space=False), added="\n    "),
    "one word": learned(BYTES),
    "llama3": learned(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES])),
    "qwen": learned(bounded_words(), normalizers.NFC()),
    "t5": unigram(pre_tokenizers.Metaspace()),
    "no pre-tokenizer": unigram(None, normalizers.Replace(" ", "▁")),
    "bert": wordpiece(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(st.tuples(st.sampled_from(UNITS), st.sampled_from([1, 2, 3, 5, 40, 255, 257, 1000])), max_size=60))
@settings(deadline=None, max_examples=15)
def test_tokens_of_the_parts_are_those_of_the_whole(name, drawn):
    fast, text = TOKENIZERS[name], "".join(unit * count for unit, count in drawn)
    parts = list(TextCuts(fast).parts([text], 600))
    assert "".join(parts) == text
    ids = chain.from_iterable(fast.encode(part, add_special_tokens=False).ids for part in parts)
    assert list(ids) == fast.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "name", sorted(TOKENIZERS.keys() - {"one word", "no pre-tokenizer", "gpt2 with a blank before"})
)
def test_ordinary_text_is_cut(name):
    parts = list(TextCuts(TOKENIZERS[name]).parts(["the quick brown fox don't jump\n" * 500], 2000))
    assert max(map(len, parts)) <= 4000


@pytest.mark.parametrize("name", ["bpe", "bytes", "chars"])
@pytest.mark.parametrize("unit", ["a", "-", " ", "明", "😀", "7", "aZ", "\n"])
def test_text_of_one_word_is_cut(name, unit):
    text = unit * 20_000
    parts = list(TextCuts(TOKENIZERS[name]).parts([text], 2000))
    assert max(map(len, parts)) <= 4000


def test_ordinary_words_are_those_of_gpt2():
    usual = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in TEXTS:
        assert bounded_words().pre_tokenize_str(text) == usual.pre_tokenize_str(text)
    lengths = [end - begin for _, (begin, end) in bounded_words().pre_tokenize_str(" " + "ab" * 1000 + "-" * 300)]
    assert max(lengths) == LONGEST_WORD + 1  # and the blank before
