"""Sampling: one loop over ``prefill`` and ``decode``, for every family whose objective offers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from train import rng, schema
from train.errors import UserError

OnToken = Callable[[int, int], None]
OnStop = Callable[[int, str], None]


class Model(Protocol):
    """What can be sampled from; ``state`` is its own affair."""

    @property
    def max_len(self) -> int:
        """The longest sequence, in tokens, prompt included."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of ``nn.Module``."""

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Logits (B, V) after each prompt, and a state with room for ``capacity`` tokens a row."""

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (B, V) after one more token (B,) a row, and the state then."""


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: schema.Generation,
    eot: int,
    on_token: OnToken | None = None,
    on_stop: OnStop | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, in tokens, without the prompt and without the final ``eot``.

    Prompts of unequal length run together; each row keeps a length of its own, so a row's text is what it would be
    alone. An empty prompt starts from ``eot``, the start of a document. Row i draws from a generator of
    (options.seed, i), on the CPU. A row stops at ``eot``, after ``options.max_tokens``, or when prompt and text fill
    ``model.max_len`` (later positions were never trained, and to slide on would not be exact). ``on_token(row,
    token)`` is called as a token is drawn, ``on_stop(row, "eot" | "max_tokens" | "max_len")`` when a row ends. The
    model should be in eval mode. Raises UserError for a prompt longer than ``model.max_len``.
    """
    prompts = [list(prompt) or [eot] for prompt in prompts]
    for row, prompt in enumerate(prompts):
        if len(prompt) > model.max_len:
            raise UserError(f"prompt {row} has {len(prompt)} tokens, the model's longest sequence {model.max_len}: shorten it")
    room = [min(options.max_tokens, model.max_len - len(prompt)) for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))

    def stop(row: int, reason: str) -> None:
        going.discard(row)
        if on_stop is not None:
            on_stop(row, reason)

    def stop_full() -> None:
        for row in sorted(going):
            if len(texts[row]) >= room[row]:
                stop(row, "max_tokens" if room[row] == options.max_tokens else "max_len")

    stop_full()
    generators = [rng.generator(options.seed, "generate", row) for row in range(len(prompts))]
    logits, state = _prefill(model, prompts, max(room), eot) if going else (torch.empty(0), None)
    while going:
        tokens = choose(logits, options, [g.random() for g in generators])
        for row in sorted(going):
            if tokens[row] == eot:
                stop(row, "eot")
                continue
            texts[row].append(tokens[row])
            if on_token is not None:
                on_token(row, tokens[row])
        stop_full()
        if going:
            logits, state = model.decode(torch.tensor(tokens, device=logits.device), state)
    return texts


def choose(logits: Tensor, options: schema.Generation, uniform: Sequence[float]) -> list[int]:
    """The next token of each row of logits (B, V), given a number in [0, 1) a row; greedy at temperature 0."""
    if options.temperature == 0:
        return logits.argmax(-1).tolist()
    weights = probabilities(logits, options).double().cpu().numpy()
    return [_draw(row, u) for row, u in zip(weights, uniform, strict=True)]


def probabilities(logits: Tensor, options: schema.Generation) -> Tensor:
    """What a row of logits (B, V) is sampled from, float32: temperature, then the top k, then the smallest top p.

    ``top_p`` keeps the likeliest tokens until their sum reaches it, at least one (Holtzman et al. 2020).
    """
    logits = logits.float() / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if options.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probs = probs.masked_fill(torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before >= options.top_p), 0)
    return probs / probs.sum(-1, keepdim=True)


def _draw(weights: np.ndarray, uniform: float) -> int:
    """The index whose share of the cumulated weights holds ``uniform``; never one of weight 0."""
    edges = weights.cumsum()
    last = int(np.searchsorted(edges, edges[-1]))  # rounding may put the draw at the very end
    return min(int(np.searchsorted(edges, uniform * edges[-1], side="right")), last)


def _prefill(model: Model, prompts: Sequence[Sequence[int]], more: int, filler: int) -> tuple[Tensor, Any]:
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    padded = [[*prompt, *[filler] * (longest - len(prompt))] for prompt in prompts]
    capacity = min(model.max_len, longest + more)
    return model.prefill(torch.tensor(padded, device=device), torch.tensor(lengths, device=device), capacity)
