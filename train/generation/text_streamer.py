"""Encodes prompts, runs the sampler or beam search, and decodes tokens to text as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from train.config import schema
from train.data.tokenizer import Tokenizer
from train.generation.beam_search import beam_search
from train.generation.prompts import encode_prompt
from train.generation.sample_loop import PromptBatch, Reason, generate
from train.models.generation_api import Generative

ShowText = Callable[[int, str], None]
"""Called with (row, piece of its text) as text comes."""

CONTEXT_TOKENS = 8
"""Tokens decoded before the newest one: some tokenizers decode a word differently at the start of a text."""
MAX_INCOMPLETE = 3
"""U+FFFD at the end of a text that later tokens may complete: a character of UTF-8 has up to four bytes."""


class TextStreamer:
    """Decodes one text incrementally, holding back incomplete characters and possible stop strings.

    A character whose bytes come in several tokens is shown when it is complete. Text that may turn out to be a stop
    string is held back, wherever token borders fall in it; the text ends before the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        """``before`` are the tokens that the text continues."""
        self.decode, self.stop = tokenizer.decode, stop
        self.window = list(before)[-CONTEXT_TOKENS:]
        self.window_end = len(self.decode(self.window))
        self.text = ""
        self.shown = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token; returns the text that can be shown since the last call. ``stopped`` is set by a stop string."""
        self.window.append(token)
        decoded = self.decode(self.window)
        complete = len(decoded) - min(MAX_INCOMPLETE, len(decoded) - len(decoded.rstrip("\ufffd")))
        self._append_text(decoded[self.window_end : complete])
        self.window_end = max(self.window_end, complete)
        if complete == len(decoded) and len(self.window) > 2 * CONTEXT_TOKENS:
            self.window = self.window[-CONTEXT_TOKENS:]
            self.window_end = len(self.decode(self.window))
        return self._unshown_text(0 if self.stopped else max(map(self._begun_length, self.stop), default=0))

    def end(self) -> str:
        """Remaining text of a finished continuation; bytes of an incomplete character become U+FFFD."""
        if not self.stopped:
            self._append_text(self.decode(self.window)[self.window_end :])
        return self._unshown_text(0)

    def _begun_length(self, stop: str) -> int:
        """Length of the longest beginning of a stop string that the text ends with; 0 if there is none."""
        return max((n for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)

    def _append_text(self, piece: str) -> None:
        since = max(0, len(self.text) + 1 - max(map(len, self.stop), default=1))
        self.text += piece
        matches = [(at + len(stop), at) for stop in self.stop if (at := self.text.find(stop, since)) >= 0]
        if matches:  # the first to be complete, as if characters had come one by one
            self.text, self.stopped = self.text[: min(matches)[1]], True

    def _unshown_text(self, held_back: int) -> str:
        piece = self.text[self.shown : len(self.text) - held_back]
        self.shown += len(piece)
        return piece


@dataclass(frozen=True)
class GeneratedText:
    """A generated text, the reason it ended, and its beam score if there is one."""

    text: str
    reason: Reason
    score: float | None


def generate_text(
    model: Generative,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: schema.GenerationConfig,
    show: ShowText = lambda row, piece: None,
) -> Iterator[list[GeneratedText]]:
    """Generate ``options.n`` texts per prompt, ``options.batch`` prompts at a time; with beams the best text first.

    ``show(row, piece)`` is called as text comes, row being prompt * n + text: the pieces of a row are its text. Raises
    UserError for a prompt that is too long, before the first text is generated.
    """
    tokens = encode_prompts(model, tokenizer, prompts, options)

    def show_from(first_row: int) -> ShowText:
        return lambda row, piece: show(first_row + row, piece)

    generate_batch = _beam_search_texts if options.beams > 1 else _sample_texts
    for start in range(0, len(tokens), options.batch):
        part = tokens[start : start + options.batch]
        yield from generate_batch(model, tokenizer, part, options, show_from(start * options.n))


def encode_prompts(
    model: Generative, tokenizer: Tokenizer, prompts: Sequence[str], options: schema.GenerationConfig
) -> list[list[int]]:
    """Token ids of each prompt: the start of a document where the text continues it, else a whole document.

    Raises UserError for a prompt that is too long, or has characters that the tokenizer does not know.
    """
    tokens = [encode_prompt(tokenizer, prompt, model.continues) for prompt in prompts]
    return PromptBatch(model, tokens, options, tokenizer.eot).tokens


def _sample_texts(
    model: Generative,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    options: schema.GenerationConfig,
    show: ShowText,
) -> list[list[GeneratedText]]:
    streamers: list[TextStreamer] = []
    for prompt in prompts:
        context = prompt if model.continues else []
        streamers += [TextStreamer(tokenizer, context, options.stop) for _ in range(options.n)]

    def on_token(row: int, token: int) -> bool:
        show(row, streamers[row].add(token))
        return streamers[row].stopped

    texts = generate(model, prompts, options, tokenizer.eot, on_token)
    for row, streamer in enumerate(streamers):
        show(row, streamer.end())
    remaining = iter(streamers)
    results = []
    for continuations in texts:
        results.append([GeneratedText(next(remaining).text, text.reason, None) for text in continuations])
    return results


def _beam_search_texts(
    model: Generative,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    options: schema.GenerationConfig,
    show: ShowText,
) -> list[list[GeneratedText]]:
    def decode(prompt: int, tokens: Sequence[int]) -> TextStreamer:
        streamer = TextStreamer(tokenizer, prompts[prompt] if model.continues else [], options.stop)
        for token in tokens:
            streamer.add(token)
        return streamer

    def stopped(prompt: int, tokens: Sequence[int]) -> bool:
        return bool(options.stop) and decode(prompt, tokens).stopped

    results = []
    for prompt, continuations in enumerate(beam_search(model, prompts, options, tokenizer.eot, stopped)):
        texts = []
        for k, continuation in enumerate(continuations):
            streamer = decode(prompt, continuation.tokens)
            streamer.end()
            show(prompt * options.n + k, streamer.text)
            texts.append(GeneratedText(streamer.text, continuation.reason, continuation.score))
        results.append(texts)
    return results
