"""Chooses tokens from logits: repetition penalty, truncation and draws, as pure functions in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.config import schema


def choose_tokens(logits: Tensor, options: schema.GenerationConfig, uniform: Sequence[float]) -> list[int]:
    """Next token per row of logits (B, V), by one uniform number in [0, 1) each; at temperature 0 the most likely."""
    if options.temperature == 0:
        return logits.argmax(-1).tolist()
    weights = probabilities(logits, options).cpu().numpy()
    return [_draw_index(row, u) for row, u in zip(weights, uniform, strict=True)]


def apply_repetition_penalty(scores: Tensor, written: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Scores (B, V) with a repetition penalty on the tokens that are already ``written`` in a row.

    Divided by ``penalty`` where positive, else multiplied by it (Keskar et al. 2019, section 4.1); below 1 it rewards.
    """
    if penalty == 1:
        return scores
    repeated = torch.zeros(scores.shape, dtype=torch.bool)
    for row, tokens in enumerate(written):
        repeated[row, torch.tensor(tokens, dtype=torch.int64)] = True
    return torch.where(repeated.to(scores.device), torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def probabilities(logits: Tensor, options: schema.GenerationConfig) -> Tensor:
    """Distribution that a row of logits (B, V) is sampled from, float64: temperature, then truncation in this order.

    ``top_k``: the k most likely (and ties with the last of them). ``top_p``: the most likely until their sum reaches p,
    at least one (Holtzman et al. 2020). ``min_p``: those at least min_p times as likely as the most likely (Nguyen et
    al. 2024). The kept tokens are renormalised, between the cuts too.
    """
    logits = logits.double() / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if options.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before >= options.top_p)
        probs = probs.masked_fill(dropped, 0)
    if options.min_p > 0:
        probs = probs.masked_fill(probs < options.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def _draw_index(weights: np.ndarray, uniform: float) -> int:
    """Index whose share of the cumulative weights holds ``uniform``; never one of weight 0."""
    edges = weights.cumsum()
    last = int(np.searchsorted(edges, edges[-1]))  # rounding may put the draw at the very end
    return min(int(np.searchsorted(edges, uniform * edges[-1], side="right")), last)
