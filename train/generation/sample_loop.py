"""Samples text token by token with any model that has ``prefill`` and ``decode``.

``train.models.generation_api`` is the protocol of such models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from train.config import schema
from train.distributed import heartbeat
from train.generation.prompts import require_room
from train.generation.sampling import apply_repetition_penalty, choose_tokens
from train.models.generation_api import Generative
from train.util import seeding

Reason = Literal["eot", "stop", "max_tokens", "max_len"]


@dataclass
class Continuation:
    """Tokens generated after a prompt, without the token that ended them, and the reason they ended."""

    tokens: list[int] = field(default_factory=list)
    reason: Reason = "max_tokens"
    score: float | None = None
    """Score of a beam: the sum of its tokens' log-probabilities over a power of their number."""


class PromptBatch:
    """Validated prompts of unequal length, padded to one tensor, with the room that each row has left."""

    def __init__(
        self, model: Generative, prompts: Sequence[Sequence[int]], options: schema.GenerationConfig, eot: int
    ) -> None:
        """An empty prompt becomes ``eot``, the start of a document. Raises UserError for one that is too long."""
        self.model, self.filler = model, eot
        self.tokens = [list(prompt) or [eot] for prompt in prompts]
        for row, prompt in enumerate(self.tokens):
            require_room(row, len(prompt), model.max_len)
        self.written = self.tokens if model.continues else [[] for _ in self.tokens]
        """Tokens of each row that its text continues: none where the text answers the prompt."""
        free = [model.max_len - len(written) for written in self.written]
        self.room = [min(options.max_tokens, room) for room in free]
        """Tokens that each text may have."""
        self.full: list[Reason] = ["max_tokens" if options.max_tokens <= room else "max_len" for room in free]
        """Reason to give for a text that uses all of its room."""

    def prefill(self, rows: Sequence[int]) -> tuple[Tensor, Any]:
        """Logits and decoding state of the model after the prompts of some rows."""
        device = next(self.model.parameters()).device
        prompts = [self.tokens[row] for row in rows]
        longest = max(len(prompt) for prompt in prompts)
        padded = [[*prompt, *[self.filler] * (longest - len(prompt))] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest_written = max(len(self.written[row]) for row in rows)
        longest_text = max(self.room[row] for row in rows)
        capacity = min(self.model.max_len, longest_written + longest_text)
        return self.model.prefill(torch.tensor(padded, device=device), lengths, capacity)


@torch.no_grad()
def generate(
    model: Generative,
    prompts: Sequence[Sequence[int]],
    options: schema.GenerationConfig,
    eot: int,
    on_token: Callable[[int, int], bool] = lambda row, token: False,
) -> list[list[Continuation]]:
    """Sample ``options.n`` continuations of each prompt, one token at a time.

    Prompts of unequal length run together, and each row keeps a length of its own. Text k of a prompt draws from a
    generator of (seed, prompt, k), on the CPU: it is what it would be alone, up to the rounding of sums. It is row
    prompt * n + k, and ends at ``eot``, where ``on_token(row, token)``, called as a token is drawn, is true ("stop"),
    after ``options.max_tokens``, or when ``model.max_len`` is full (later positions were never trained, and a sliding
    window would not be exact). Finished rows are dropped from the batch. The model should be in eval mode. Raises
    UserError for a prompt longer than ``model.max_len``.
    """
    batch, n = PromptBatch(model, prompts, options, eot), options.n
    texts: list[Continuation] = []
    generators: list[np.random.Generator] = []
    for prompt, reason in zip(batch.tokens, batch.full, strict=True):
        texts += [Continuation(reason=reason) for _ in range(n)]
        generators += [seeding.generator(options.seed, "generate", prompt, k) for k in range(n)]

    def add_token(row: int, token: int) -> bool:
        """Add a token to the text of a row; returns whether the text continues."""
        text = texts[row]
        if token == eot:
            text.reason = "eot"
            return False
        text.tokens.append(token)
        if on_token(row, token):
            text.reason = "stop"
            return False
        return len(text.tokens) < batch.room[row // n]

    started = [number for number, room in enumerate(batch.room) if room > 0]
    rows: list[int] = []
    for number in started:
        rows += range(number * n, (number + 1) * n)
    if rows:
        logits, state = batch.prefill(started)
        if n > 1:
            repeated = torch.arange(len(started), device=logits.device).repeat_interleave(n)
            logits, state = logits[repeated], state.rows(repeated)
    while rows:
        heartbeat.touch()
        written = [batch.written[row // n] + texts[row].tokens for row in rows]
        scores = apply_repetition_penalty(logits, written, options.repetition_penalty)
        tokens = choose_tokens(scores, options, [generators[row].random() for row in rows])
        unfinished = [i for i, row in enumerate(rows) if add_token(row, tokens[i])]
        if 0 < len(unfinished) < len(rows):
            state = state.rows(torch.tensor(unfinished, device=logits.device))
        rows = [rows[i] for i in unfinished]
        if rows:
            logits, state = model.decode(torch.tensor([tokens[i] for i in unfinished], device=logits.device), state)
    return [texts[start : start + n] for start in range(0, len(texts), n)]
