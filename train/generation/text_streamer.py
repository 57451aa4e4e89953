"""Encodes prompts, runs the sampler or beam search, and decodes tokens to text as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from train.config import schema
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.generation.beam_search import beam_search
from train.generation.generate import PromptBatch, Reason, generate
from train.models.generation_api import Generative

Show = Callable[[int, str], None]

CONTEXT = 8
"""Tokens that a text is decoded with before its newest: some tokenizers write a word otherwise at the start of a text.
"""
SPLIT = 3
"""Replacement characters at the end of a text that tokens to come may still change: a character has up to four bytes.
"""


class TextStreamer:
    """Decodes one text incrementally, holding back incomplete characters and possible stop strings.

    A character whose bytes come in several tokens is shown when it is complete. Text that may turn out to be a stop
    string is held back, wherever token borders fall in it; the text ends before the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        """``before`` are the tokens that the text continues."""
        self.decode, self.stop = tokenizer.decode, stop
        self.window = list(before)[-CONTEXT:]
        self.at = len(self.decode(self.window))
        self.text = ""
        self.shown = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that can be shown now and could not before; ``stopped`` says whether a stop string has come."""
        self.window.append(token)
        decoded = self.decode(self.window)
        whole = len(decoded) - min(SPLIT, len(decoded) - len(decoded.rstrip("\ufffd")))
        self._take(decoded[self.at : whole])
        self.at = max(self.at, whole)
        if whole == len(decoded) and len(self.window) > 2 * CONTEXT:
            self.window = self.window[-CONTEXT:]
            self.at = len(self.decode(self.window))
        begun = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return self._show(0 if self.stopped else max(begun, default=0))

    def end(self) -> str:
        """Remaining text of a finished continuation; bytes of an incomplete character become U+FFFD."""
        if not self.stopped:
            self._take(self.decode(self.window)[self.at :])
        return self._show(0)

    def _take(self, more: str) -> None:
        since = max(0, len(self.text) + 1 - max(map(len, self.stop), default=1))
        self.text += more
        found = [(at + len(stop), at) for stop in self.stop if (at := self.text.find(stop, since)) >= 0]
        if found:  # the first to be whole, as if characters had come one by one
            self.text, self.stopped = self.text[: min(found)[1]], True

    def _show(self, held_back: int) -> str:
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
    options: schema.Generation,
    show: Show = lambda row, piece: None,
) -> Iterator[list[GeneratedText]]:
    """``options.n`` texts after each prompt, ``options.batch`` prompts at a time; with beams the best first.

    ``show(row, piece)`` is called as text comes, row being prompt * n + text: the pieces of a row are its text. Raises
    UserError for a prompt that is too long, before the first text is written.
    """
    tokens = encode_prompts(model, tokenizer, prompts, options)

    def from_row(first: int) -> Show:
        return lambda row, piece: show(first + row, piece)

    find = _search if options.beams > 1 else _draw
    for at in range(0, len(tokens), options.batch):
        yield from find(model, tokenizer, tokens[at : at + options.batch], options, from_row(at * options.n))


def encode_prompts(
    model: Generative, tokenizer: Tokenizer, prompts: Sequence[str], options: schema.Generation
) -> list[list[int]]:
    """Token ids of each prompt: the start of a document where the text continues it, else a whole document.

    Raises UserError for one that is too long, or has characters that the tokenizer does not know.
    """
    tokens = []
    for prompt in prompts:
        try:
            ids = tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f"prompt {prompt[:40]!r}: {error}") from None
        answer = [*ids, tokenizer.eot, tokenizer.find("<pad>", tokenizer.eot)]  # which is what targets begin with
        tokens.append([tokenizer.eot, *ids] if model.continues else answer)
    return PromptBatch(model, tokens, options, tokenizer.eot).tokens


def _draw(
    model: Generative, tokenizer: Tokenizer, prompts: Sequence[list[int]], options: schema.Generation, show: Show
) -> list[list[GeneratedText]]:
    contexts = [prompt if model.continues else [] for prompt in prompts]
    writers = [TextStreamer(tokenizer, context, options.stop) for context in contexts for _ in range(options.n)]

    def on_token(row: int, token: int) -> bool:
        show(row, writers[row].add(token))
        return writers[row].stopped

    texts = generate(model, prompts, options, tokenizer.eot, on_token)
    for row, writer in enumerate(writers):
        show(row, writer.end())
    rest = iter(writers)
    return [[GeneratedText(next(rest).text, text.reason, None) for text in several] for several in texts]


def _search(
    model: Generative, tokenizer: Tokenizer, prompts: Sequence[list[int]], options: schema.Generation, show: Show
) -> list[list[GeneratedText]]:
    def read(prompt: int, tokens: Sequence[int]) -> TextStreamer:
        writer = TextStreamer(tokenizer, prompts[prompt] if model.continues else [], options.stop)
        for token in tokens:
            writer.add(token)
        return writer

    def stopped(prompt: int, tokens: Sequence[int]) -> bool:
        return bool(options.stop) and read(prompt, tokens).stopped

    found = []
    for prompt, several in enumerate(beam_search(model, prompts, options, tokenizer.eot, stopped)):
        writers = [read(prompt, text.tokens) for text in several]
        for k, writer in enumerate(writers):
            writer.end()
            show(prompt * options.n + k, writer.text)
        found.append([GeneratedText(w.text, text.reason, text.score) for w, text in zip(writers, several, strict=True)])
    return found
