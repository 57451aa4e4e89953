"""From logits to tokens: penalties, cuts and draws, each a function of its arguments alone. All of it in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.config import schema


def choose(logits: Tensor, options: schema.Generation, uniform: Sequence[float]) -> list[int]:
    """The next token of each row of logits (B, V), given a number in [0, 1) a row; the likeliest at temperature 0."""
    if options.temperature == 0:
        return logits.argmax(-1).tolist()
    weights = probabilities(logits, options).cpu().numpy()
    return [_draw(row, u) for row, u in zip(weights, uniform, strict=True)]


def penalised(scores: Tensor, held: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Scores (B, V) with those of the tokens that a row holds made less likely: divided by ``penalty`` where above 0, else
    multiplied by it (Keskar et al. 2019, section 4.1); below 1 it makes them likelier.
    """
    if penalty == 1:
        return scores
    seen = torch.zeros(scores.shape, dtype=torch.bool)
    for row, tokens in enumerate(held):
        seen[row, torch.tensor(tokens, dtype=torch.int64)] = True
    return torch.where(seen.to(scores.device), torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def probabilities(logits: Tensor, options: schema.Generation) -> Tensor:
    """What a row of logits (B, V) is drawn from, float64: temperature, then what is kept of it, in this order.

    ``top_k``: the k likeliest (and those that are just as likely as the last of them). ``top_p``: the likeliest until their sum
    reaches p, at least one (Holtzman et al. 2020). ``min_p``: those at least min_p times as likely as the likeliest (Nguyen et al.
    2024). What is kept is scaled to a sum of 1 again, between the cuts too.
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
    """The index whose share of the cumulated weights holds ``uniform``; never one of weight 0."""
    edges = weights.cumsum()
    last = int(np.searchsorted(edges, edges[-1]))  # rounding may put the draw at the very end
    return min(int(np.searchsorted(edges, uniform * edges[-1], side="right")), last)
