"""Generates text token by token with any model that offers ``prefill`` and ``decode``
(``train.models.generation_api``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from train.config import schema
from train.distributed import heartbeat
from train.errors import UserError
from train.generation.sampling import choose, penalised
from train.models.generation_api import Generative
from train.util import seeding

Reason = Literal["eot", "stop", "max_tokens", "max_len"]


@dataclass
class Continuation:
    """Tokens generated after a prompt, without the token that ended them, and the reason they ended."""

    tokens: list[int] = field(default_factory=list)
    reason: Reason = "max_tokens"
    score: float | None = None
    """Of a beam: the sum of its tokens' log-probabilities over a power of their number."""


class PromptBatch:
    """Validated prompts of unequal length, padded to one tensor, with the room that each row has left."""

    def __init__(
        self, model: Generative, prompts: Sequence[Sequence[int]], options: schema.Generation, eot: int
    ) -> None:
        """An empty prompt becomes ``eot``, the start of a document. Raises UserError for one longer than
        ``model.max_len``.
        """
        self.model, self.filler = model, eot
        self.tokens = [list(prompt) or [eot] for prompt in prompts]
        for row, prompt in enumerate(self.tokens):
            if len(prompt) > model.max_len:
                raise UserError(
                    f"prompt {row} has {len(prompt)} tokens, and the model's longest sequence is {model.max_len}: shorten it"
                )
        self.held = self.tokens if model.continues else [[] for _ in self.tokens]
        """The tokens that count as written already: none, where the text answers the prompt."""
        left = [model.max_len - len(held) for held in self.held]
        self.room = [min(options.max_tokens, room) for room in left]
        self.full: list[Reason] = ["max_tokens" if options.max_tokens <= room else "max_len" for room in left]

    def prefill(self, rows: Sequence[int]) -> tuple[Tensor, Any]:
        """Logits and decoding state of the model after the prompts of some rows."""
        device = next(self.model.parameters()).device
        prompts = [self.tokens[row] for row in rows]
        longest = max(len(prompt) for prompt in prompts)
        padded = [[*prompt, *[self.filler] * (longest - len(prompt))] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        capacity = min(
            self.model.max_len, max(len(self.held[row]) for row in rows) + max(self.room[row] for row in rows)
        )
        return self.model.prefill(torch.tensor(padded, device=device), lengths, capacity)


@torch.no_grad()
def generate(
    model: Generative,
    prompts: Sequence[Sequence[int]],
    options: schema.Generation,
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
    given, n = PromptBatch(model, prompts, options, eot), options.n
    texts = [Continuation(reason=reason) for reason in given.full for _ in range(n)]
    draws = [seeding.generator(options.seed, "generate", prompt, k) for prompt in given.tokens for k in range(n)]

    def goes_on(row: int, token: int) -> bool:
        """Whether a row continues after this token."""
        text = texts[row]
        if token == eot:
            text.reason = "eot"
            return False
        text.tokens.append(token)
        if on_token(row, token):
            text.reason = "stop"
            return False
        return len(text.tokens) < given.room[row // n]

    starts = [number for number, room in enumerate(given.room) if room > 0]
    rows = [number * n + k for number in starts for k in range(n)]
    if rows:
        logits, state = given.prefill(starts)
        if n > 1:
            each = torch.arange(len(starts), device=logits.device).repeat_interleave(n)
            logits, state = logits[each], state.rows(each)
    while rows:
        heartbeat.touch()
        scores = penalised(
            logits, [given.held[row // n] + texts[row].tokens for row in rows], options.repetition_penalty
        )
        tokens = choose(scores, options, [draws[row].random() for row in rows])
        going = [at for at, row in enumerate(rows) if goes_on(row, tokens[at])]
        if 0 < len(going) < len(rows):
            state = state.rows(torch.tensor(going, device=logits.device))
        rows = [rows[at] for at in going]
        if rows:
            logits, state = model.decode(torch.tensor([tokens[at] for at in going], device=logits.device), state)
    return [texts[at : at + n] for at in range(0, len(texts), n)]
