"""Which document each token of a packed row belongs to: made once for a batch, used by every layer."""

from __future__ import annotations

import torch
from torch import Tensor


class Segments:
    """Segment ids of queries and keys: a query sees a key only where their ids are equal.

    ``q`` (B, Tq) and ``kv`` (B, Tk) are integers. Padding has an id of its own, 0, so padding sees padding: no row of
    scores is ever empty. A kernel reads the ids; the mask is for the paths of torch, and is built when first asked for.
    """

    def __init__(self, q: Tensor, kv: Tensor) -> None:
        if q.ndim != 2 or kv.ndim != 2 or q.shape[0] != kv.shape[0]:
            raise ValueError(f"segments are (B, Tq) and (B, Tk) of one B; got {tuple(q.shape)} and {tuple(kv.shape)}")
        self.q = q
        self.kv = kv
        self._masks: dict[tuple[bool, torch.dtype], Tensor] = {}

    def visible(self, causal: bool) -> Tensor:
        """(B, Tq, Tk) bool: may this query see this key? With ``causal`` the last query stands at the last key."""
        same = self.q[:, :, None] == self.kv[:, None, :]
        return same & causal_mask(same.shape[1], same.shape[2], same.device) if causal else same

    def mask(self, causal: bool, dtype: torch.dtype) -> Tensor:
        """(B, 1, Tq, Tk) to add to the scores: 0 where visible, -inf where not. Kept for the next layer."""
        if (causal, dtype) not in self._masks:
            visible = self.visible(causal)[:, None]
            zero = torch.zeros((), dtype=dtype, device=visible.device)
            self._masks[causal, dtype] = zero.masked_fill(~visible, float("-inf"))
        return self._masks[causal, dtype]


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Tq, Tk) bool, True where the key is not after the query, the last query standing at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
