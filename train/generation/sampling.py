"""From logits to tokens: repetition penalty, truncation (top-k, top-p, min-p) and draws, as pure functions in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.config import schema


def choose(logits: Tensor, options: schema.Generation, uniform: Sequence[float]) -> list[int]:
    """Next token of each row of logits (B, V), given one uniform number in [0, 1) per row; the most likely at
    temperature 0.
    """
    if options.temperature == 0:
        return logits.argmax(-1).tolist()
    weights = probabilities(logits, options).cpu().numpy()
    return [_draw(row, u) for row, u in zip(weights, uniform, strict=True)]


def penalised(scores: Tensor, held: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Scores (B, V) with a repetition penalty on the tokens that a row already holds.

    Divided by ``penalty`` where positive, else multiplied by it (Keskar et al. 2019, section 4.1); below 1 it rewards.
    """
    if penalty == 1:
        return scores
    seen = torch.zeros(scores.shape, dtype=torch.bool)
    for row, tokens in enumerate(held):
        seen[row, torch.tensor(tokens, dtype=torch.int64)] = True
    return torch.where(seen.to(scores.device), torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def probabilities(logits: Tensor, options: schema.Generation) -> Tensor:
    """Distribution that a row of logits (B, V) is sampled from, float64: temperature, then truncation in this order.

    ``top_k``: the k most likely (and ties with the last of them). ``top_p``: the most likely until their sum reaches p,
    at least one (Holtzman et al. 2020). ``min_p``: those at least min_p times as likely as the most likely (Nguyen et
    al. 2024). What is kept is renormalised, between the cuts too.
    """
    logits = logits.double() / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if options.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probs = probs.masked_fill(
            torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before >= options.top_p), 0
        )
    if options.min_p > 0:
        probs = probs.masked_fill(probs < options.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def _draw(weights: np.ndarray, uniform: float) -> int:
    """Index whose share of the cumulative weights holds ``uniform``; never one of weight 0."""
    edges = weights.cumsum()
    last = int(np.searchsorted(edges, edges[-1]))  # rounding may put the draw at the very end
    return min(int(np.searchsorted(edges, uniform * edges[-1], side="right")), last)
