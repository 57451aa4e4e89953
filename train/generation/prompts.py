"""Prompts of a run's samples: which there are, their tokens, and whether the model has room for them.

Imports no torch: the driver checks given prompts before a corpus is prepared for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from train.config.schema import Config
from train.data.tokenizer import Tokenizer
from train.errors import UserError

PYTHON_PROMPTS = ("def", "class")
"""Default of the embedded corpus, which is Python. No blank ends them: a BPE keeps it with the word that follows."""


def encode_prompt(tokenizer: Tokenizer, prompt: str, continues: bool) -> list[int]:
    """Token ids of a prompt: the start of a document where the text ``continues`` it, else a whole document.

    Raises UserError for characters that the tokenizer does not know.
    """
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"prompt {prompt[:40]!r}: {error}") from None
    if continues:
        return [tokenizer.eot, *ids]
    return [*ids, tokenizer.eot, tokenizer.find("<pad>", tokenizer.eot)]  # a target starts with padding


def require_room(number: int, tokens: int, max_len: int) -> None:
    """Raise UserError where a prompt has more tokens than the model's longest sequence."""
    if tokens > max_len:
        raise UserError(
            f"prompt {number} has {tokens} tokens, and the model's longest sequence is {max_len}: shorten it"
        )


def check_given(config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError where a prompt that ``generation.prompts`` names is none for this tokenizer and model."""
    for number, prompt in enumerate(config.generation.prompts or ()):
        _check(config, tokenizer, number, prompt)


def with_prompts(config: Config, tokenizer: Tokenizer, note: Callable[[str], None]) -> Config:
    """``config`` with the prompts that samples begin with: those given, or of the default ones those that fit, with a
    ``note`` of the others.

    By default the words that Python begins with where the corpus is Python, elsewhere the start of a document.
    Raises UserError for a given one that does not fit.
    """
    if config.generation.prompts is not None:
        check_given(config, tokenizer)
        return config
    fitting: list[str] = []
    # A model of conversations answers, and continues no text: `./launch.sh chat` talks to it.
    defaults: dict[str, tuple[str, ...]] = {"stdlib": PYTHON_PROMPTS, "chat": ()}
    for number, prompt in enumerate(defaults.get(config.data.source, ("",))):
        try:
            _check(config, tokenizer, number, prompt)
            fitting.append(prompt)
        except UserError as error:
            note(f"no sample of the default {error}")
    return config.model_copy(update={"generation": config.generation.model_copy(update={"prompts": fitting})})


def _check(config: Config, tokenizer: Tokenizer, number: int, prompt: str) -> None:
    if config.objective.name not in ("causal", "seq2seq"):
        return  # it writes no text
    try:
        ids = encode_prompt(tokenizer, prompt, continues=config.objective.name == "causal")
        require_room(number, len(ids), getattr(config.model, "max_len", sys.maxsize))
    except UserError as error:
        raise UserError(f"generation.prompts: {error}") from None
