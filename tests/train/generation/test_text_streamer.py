"""Tests of incremental decoding: shown text is whole characters, without part of a stop string."""

import itertools
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import schema
from train.config.keys.data import TokenizerConfig
from train.data.tokenizer import Tokenizer, build_tokenizer
from train.errors import UserError
from train.generation.text_streamer import TextStreamer, generate_text
from train.objectives import build_objective


class Pieces:
    """A tokenizer whose tokens are the given pieces of bytes."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def cut(data, offsets):
    """Bytes cut at some offsets, also inside a character."""
    edges = [0, *sorted({offset % (len(data) + 1) for offset in offsets}), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def ended(text, stops):
    """The text before the first complete stop string, the longest of those that end there."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


LETTERS = st.text(st.sampled_from("ab\n é中\U0001f6a3\ufffd"), max_size=40)
OFFSETS = st.lists(st.integers(0, 200), max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    LETTERS,
    st.lists(st.integers(0, 200), max_size=60),
    st.lists(st.text("ab\né中", min_size=1, max_size=4), max_size=3),
    LETTERS,
)
def test_shown_text_is_a_prefix_without_part_of_a_stop_string(text, offsets, stops, before):
    pieces = cut(text.encode(), offsets)
    prompt = [piece.encode() for piece in before]
    streamer = TextStreamer(Pieces([*prompt, *pieces]), range(len(prompt)), stops)
    expected, stopped = ended(text, stops)
    shown = ""
    for token in range(len(prompt), len(prompt) + len(pieces)):
        shown += streamer.add(token)
        assert expected.startswith(shown)
        if streamer.stopped:
            break
    shown += streamer.end()
    assert shown == streamer.text == expected
    assert streamer.stopped is stopped


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), OFFSETS)
def test_invalid_bytes_are_shown_as_the_tokenizer_decodes_them(data, offsets):
    pieces = cut(data, offsets)
    streamer = TextStreamer(Pieces(pieces), [], [])
    shown = "".join(streamer.add(token) for token in range(len(pieces))) + streamer.end()
    assert shown == data.decode("utf-8", "replace")


def test_complete_characters_are_shown_at_once():
    streamer = TextStreamer(Pieces([b"a", "é".encode()[:1], "é".encode()[1:], b"EN", b"T", b"EN", b"D"]), [], ["END"])
    assert [streamer.add(token) for token in range(7)] == ["a", "", "é", "", "ENT", "", ""]
    assert (streamer.end(), streamer.text, streamer.stopped) == ("", "aéENT", True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(build_tokenizer(TokenizerConfig(kind="bytes"), [], ""))


@pytest.fixture
def model(make_config):
    return build_objective(make_config("gpt_tiny", init_std=0.3, max_len=40), 257).double().eval()


def options(**keys):
    return schema.GenerationConfig.model_validate({"prompts": [], "max_tokens": 12, "temperature": 1.0} | keys)


@pytest.mark.parametrize("keys", [{}, {"n": 2}, {"beams": 3, "n": 2}])
def test_texts_equal_shown_pieces_for_any_batch_of_prompts(model, tokenizer, keys):
    prompts = ["one", "", "another, and longer", "one"]
    shown = {}
    generated, texts = [], []

    def show(row, piece):
        shown[row] = shown.get(row, "") + piece

    for batch in (1, 3):
        shown.clear()
        generated.append(list(generate_text(model, tokenizer, prompts, options(batch=batch, **keys), show)))
        texts.append([text.text for text in itertools.chain(*generated[-1])])
        assert [shown[row] for row in range(len(shown))] == texts[-1]
    assert texts[0] == texts[1]
    assert [len(of_prompt) for of_prompt in generated[0]] == list(map(len, generated[1]))
    assert generated[0][0] == generated[0][3], "the same prompt and seed, the same text"


@pytest.mark.parametrize("beams", [1, 3])
def test_text_ends_before_a_stop_string(model, tokenizer, beams):
    [[whole]] = generate_text(model, tokenizer, ["x"], options(beams=beams, temperature=0.0))
    stop = whole.text[3:5]
    [[text]] = generate_text(model, tokenizer, ["x"], options(beams=beams, temperature=0.0, stop=["never", stop]))
    if beams == 1:
        assert (text.text, text.reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert stop not in text.text


def test_too_long_prompt_is_refused_before_any_text(model, tokenizer):
    shown = []
    with pytest.raises(UserError, match=r"prompt 1 has 51 tokens.*40.*shorten"):
        next(
            generate_text(
                model, tokenizer, ["short", "x" * 50], options(batch=1), lambda row, piece: shown.append(piece)
            )
        )
    assert not shown
    chars = Tokenizer(build_tokenizer(TokenizerConfig(kind="chars"), [], "abc"))
    with pytest.raises(UserError, match=r"prompt 'abd'.*'d'"):
        next(generate_text(model, chars, ["abd"], options()))
