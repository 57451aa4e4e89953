"""Which document each token of a packed row belongs to: made once for a batch, used by every layer."""

from __future__ import annotations

import torch
from torch import Tensor


class Segments:
    """Segment ids of queries and keys: a query sees a key only where their ids are equal.

    ``q`` (B, Tq) and ``kv`` (B, Tk) are integers. Padding has an id of its own, 0, and sees padding. What a kernel or a path
    of torch reads is derived when first asked for, on the device of the ids, and kept for the next layer.
    """

    def __init__(self, q: Tensor, kv: Tensor) -> None:
        if q.ndim != 2 or kv.ndim != 2 or q.shape[0] != kv.shape[0]:
            raise ValueError(f"segments are (B, Tq) and (B, Tk) of one B; got {tuple(q.shape)} and {tuple(kv.shape)}")
        self.q = q
        self.kv = kv
        self._masks: dict[tuple[bool, int | None, torch.dtype], Tensor] = {}
        self._marks: tuple[Tensor, Tensor] | None = None
        self._repeated: dict[int, Segments] = {}

    def visible(self, causal: bool, window: int | None = None) -> Tensor:
        """(B, Tq, Tk) bool: may this query see this key? ``band`` says what ``causal`` and ``window`` leave of it."""
        same = self.q[:, :, None] == self.kv[:, None, :]
        return same & band(same.shape[1], same.shape[2], causal, window, same.device)

    def mask(self, causal: bool, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, Tq, Tk) to add to the scores: 0 where visible, -inf where not."""
        if (causal, window, dtype) not in self._masks:
            self._masks[causal, window, dtype] = additive(self.visible(causal, window)[:, None], dtype)
        return self._masks[causal, window, dtype]

    def marks(self) -> tuple[Tensor, Tensor]:
        """What the kernels read, of queries (B, 4, Tq) and of keys (B, 4, Tk), int32: see ``_marks``."""
        if self._marks is None:
            one = self.q is self.kv
            queries = _marks(self.q, self.kv)
            self._marks = queries, queries if one else _marks(self.kv, self.q)
        return self._marks

    def repeat(self, times: int) -> Segments:
        """The segments where every query stands ``times`` in a row."""
        if times not in self._repeated:
            self._repeated[times] = Segments(self.q.repeat_interleave(times, 1), self.kv)
        return self._repeated[times]


def _marks(mine: Tensor, others: Tensor) -> Tensor:
    """(B, 4, Tm) int32 for each token of mine (B, Tm) beside others (B, To), both of them ids.

    Its id; the start and stop of the shortest interval of the others that holds every token of its id; and stop again, or 0
    where a token of another id stands in that interval. Of an id that the others lack: To, 0 and 0.
    """
    count = others.shape[1]
    if count == 0:
        return torch.stack((mine, *[torch.zeros_like(mine)] * 3), 1).int()
    ordered, places = others.sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, mine.contiguous())
    last = torch.searchsorted(ordered, mine.contiguous(), right=True)
    start = places.gather(1, first.clamp(max=count - 1)).where(last > first, count)
    stop = (places.gather(1, (last - 1).clamp(min=0)) + 1).where(last > first, 0)
    return torch.stack((mine, start, stop, stop.where(stop - start == last - first, 0)), 1).int()


def band(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(Tq, Tk) bool: the keys that a query's place lets it see, the last query standing at the last key.

    ``causal`` leaves out keys after the query; ``window`` those ``window`` places away from it and further.
    """
    everything = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        everything = everything.triu(keys - queries - window + 1)
        everything = everything if causal else everything.tril(keys - queries + window - 1)
    return everything.tril(keys - queries) if causal else everything


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: 0 where visible, -inf where not."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
