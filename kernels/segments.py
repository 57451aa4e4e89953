"""Document ids of packed rows, and the masks and visible ranges derived from them once per batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Segments:
    """Document ids of queries ``q`` (B, Tq) and keys ``kv`` (B, Tk): a query sees a key only where their ids are equal.

    Padding has id 0 and sees only padding. Masks and bounds are computed on first use, on the device of the ids, and
    cached for the next layer. Raises ValueError if the shapes do not fit.
    """

    def __init__(self, q: Tensor, kv: Tensor) -> None:
        if q.ndim != 2 or kv.ndim != 2 or q.shape[0] != kv.shape[0]:
            raise ValueError(f"segments are (B, Tq) and (B, Tk) of one B; got {tuple(q.shape)} and {tuple(kv.shape)}")
        self.q = q
        self.kv = kv
        self._masks: dict[tuple[bool, int | None, torch.dtype], Tensor] = {}
        self._bounds: tuple[Tensor, Tensor] | None = None
        self._offsets: Tensor | None = None
        self._has_offsets = False
        self._repeated: dict[int, Segments] = {}

    def visible(self, causal: bool, window: int | None = None) -> Tensor:
        """Boolean mask (B, Tq, Tk), True where a query sees a key: equal ids, within ``band_mask``."""
        same = self.q[:, :, None] == self.kv[:, None, :]
        return same & band_mask(same.shape[1], same.shape[2], causal, window, same.device)

    def mask(self, causal: bool, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask (B, 1, Tq, Tk) for the scores: 0 where visible, -inf where not."""
        if (causal, window, dtype) not in self._masks:
            self._masks[causal, window, dtype] = additive_mask(self.visible(causal, window)[:, None], dtype)
        return self._masks[causal, window, dtype]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """``segment_bounds`` of queries (B, 4, Tq) and of keys (B, 4, Tk), which the Triton kernels read."""
        if self._bounds is None:
            is_self_attention = self.q is self.kv
            q_bounds = segment_bounds(self.q, self.kv)
            self._bounds = q_bounds, q_bounds if is_self_attention else segment_bounds(self.kv, self.q)
        return self._bounds

    def run_offsets(self) -> Tensor | None:
        """Where documents begin in the rows laid end to end, and their length, int32; None where ids are not in runs.

        The number of documents is known on the device only, so the first call for a batch waits for it.
        """
        if not self._has_offsets:
            stop, stop_of_run = self.bounds()[0][:, 2], self.bounds()[0][:, 3]
            begins = self.q != self.q.roll(1, 1)
            begins[:, :1] = True
            if self.q is self.kv and bool((stop == stop_of_run).all()):
                starts = begins.flatten().nonzero()[:, 0].int()
                self._offsets = torch.cat((starts, starts.new_full((1,), self.q.numel())))
            self._has_offsets = True
        return self._offsets

    def repeat_queries(self, times: int) -> Segments:
        """These segments with every query repeated ``times`` times in a row, (B, Tq * times)."""
        if times not in self._repeated:
            self._repeated[times] = Segments(self.q.repeat_interleave(times, 1), self.kv)
        return self._repeated[times]


def segment_bounds(ids: Tensor, other_ids: Tensor) -> Tensor:
    """Where on the other side each token's document lies: int32 (B, 4, T) for ids (B, T) and other_ids (B, To).

    The four numbers of a token are its id; start and stop of the shortest interval of the other side that holds all
    tokens of its id; and stop again, or 0 where a token of another id lies in that interval. If the other side lacks
    the id, start is To and the stops are 0.
    """
    count = other_ids.shape[1]
    if count == 0:
        return torch.stack((ids, *[torch.zeros_like(ids)] * 3), 1).int()
    sorted_ids, positions = other_ids.sort(dim=1, stable=True)
    first = torch.searchsorted(sorted_ids, ids.contiguous())
    last = torch.searchsorted(sorted_ids, ids.contiguous(), right=True)
    start = positions.gather(1, first.clamp(max=count - 1)).where(last > first, count)
    stop = (positions.gather(1, (last - 1).clamp(min=0)) + 1).where(last > first, 0)
    return torch.stack((ids, start, stop, stop.where(stop - start == last - first, 0)), 1).int()


def band_mask(n_queries: int, n_keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Boolean mask (Tq, Tk) of the keys a query sees by position; the last query is aligned with the last key.

    ``causal`` hides keys after the query, ``window`` those ``window`` positions away from it and further.
    """
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask.triu(n_keys - n_queries - window + 1)
        mask = mask if causal else mask.tril(n_keys - n_queries + window - 1)
    return mask.tril(n_keys - n_queries) if causal else mask


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask to add to scores, in the shape of ``visible``: 0 where visible, -inf where not."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
