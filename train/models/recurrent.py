"""Recurrent networks: RNN (Elman 1990), LSTM (Hochreiter and Schmidhuber 1997), GRU (Cho et al. 2014), by torch's own layers.

Shapes: B rows, T tokens, D width, L layers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from train.batch import Batch
from train.config.keys import recurrent as keys
from train.models.carried_state import CarriedState
from train.models.layers import Embedding, dropout, last_token


@dataclass
class RecurrentState:
    """What decoding carries from token to token: the hidden state, and for an LSTM its cell state, (L, B, D) each."""

    hidden: Any

    def rows(self, index: Tensor) -> RecurrentState:
        """The state of which row i is row index[i] of this one."""
        kinds = self.hidden if isinstance(self.hidden, tuple) else (self.hidden,)
        chosen = tuple(kind[:, index] for kind in kinds)
        return RecurrentState(chosen if len(chosen) > 1 else chosen[0])


class SyncGradOrder(torch.autograd.Function):
    """Its arguments, unchanged; in the backward pass it waits for all their gradients and passes them on at once.

    The graph of recurrent layers depends on the documents that a rank has, and with it the order in which their weights are
    ready. ZeRO 2 sums its buckets over the ranks as they were filled: it would add one weight's gradient to another's.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        """The weights themselves."""
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Their gradients, in their order."""
        return grads


class OrderedGradRNN(nn.RNNBase):
    """Recurrent layers whose weights are ready in one order on every rank."""

    def forward(self, *arguments: Any) -> Any:
        """As torch's."""
        own = self._flat_weights
        self._flat_weights = list(SyncGradOrder.apply(*own))
        try:
            return super().forward(*arguments)
        finally:
            self._flat_weights = own


class RNN(OrderedGradRNN, nn.RNN):
    """torch's."""


class LSTM(OrderedGradRNN, nn.LSTM):
    """torch's."""


class GRU(OrderedGradRNN, nn.GRU):
    """torch's."""


class Recurrent(nn.Module):
    """Token embedding and recurrent layers."""

    def __init__(self, model: keys.Recurrent, vocab_size: int) -> None:
        """``vocab_size`` is the number of rows of the embedding."""
        super().__init__()
        self.model = model
        self.max_len = sys.maxsize
        self.embed = Embedding(vocab_size, model.width, model.width**-0.5)
        kind = {"rnn": RNN, "lstm": LSTM, "gru": GRU}[model.cell]
        more: dict[str, Any] = {"nonlinearity": model.activation} if model.cell == "rnn" else {}
        between = model.dropout if model.layers > 1 else 0.0
        self.rnn: Any = kind(model.width, model.width, model.layers, batch_first=True, dropout=between, **more)
        self.rnn.init_std = (3 * model.width) ** -0.5  # the deviation of torch's own, uniform in +-1 / sqrt(width)
        self.parts = 2 if model.cell == "lstm" else 1
        self.memory: CarriedState | None = None

    def remember(self, rows: int) -> None:
        """From now on each of the ``rows`` of a step goes on from what that row of the step before ended with."""
        self.memory = CarriedState(rows, self.parts * self.model.layers * self.model.width)

    def forward(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden states (B, T, D). With ``isolate`` every segment begins with an empty memory.

        But for the first of a row that goes on from the row before it in its stream, where rows remember.
        """
        x = dropout(self._embedded(batch["tokens"]), self.model.dropout, self.training)
        memory = self.memory if "memory" in batch else None
        before = None if memory is None else memory.read(batch["memory"]).to(x.dtype)
        if isolate:
            hidden, after = self._apart(x, batch["segments"], before)
        else:
            hidden, state = self.rnn(x, self._unfold(before))
            after = self._fold(state)
        if memory is not None:
            memory.leave(batch["memory"], after)
        return dropout(hidden, self.model.dropout, self.training)

    def pooled(self, batch: Batch, isolate: bool = True) -> Tensor:
        """The hidden state (B, D) of each row's last token."""
        return last_token(self(batch, isolate), batch)

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, RecurrentState]:
        """Reads prompts (B, T), row b holding lengths[b] tokens and then anything: the last hidden state (B, D), and all of it."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self._embedded(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, hidden = self.rnn(packed)
        return (hidden[0] if self.parts == 2 else hidden)[-1], RecurrentState(hidden)

    def decode(self, token: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One more token (B,) for every row: its hidden state (B, D), and the state after it."""
        out, hidden = self.rnn(self._embedded(token[:, None]), state.hidden)
        return out[:, 0], RecurrentState(hidden)

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of matrix products, forward and backward, per token; the head is not included. The same for any ``seq_len``."""
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[self.model.cell]
        return 6.0 * self.model.layers * gates * 2 * self.model.width**2

    def _embedded(self, tokens: Tensor) -> Tensor:
        """What layers read of tokens (B, T): (B, T, D) of unit deviation, since nothing normalises it on its way.

        Of a table that is tied to the head the scale of both is that of the Transformer (Vaswani et al. 2017, section 3.4).
        """
        return self.embed(tokens) * self.model.width**0.5

    def _apart(self, x: Tensor, segments: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every segment of every row as a sequence of its own, all at once: hidden states (B, T, D), and where each row ended.

        torch reads sequences that are packed: all first tokens, all second tokens, ..., the longest sequence first.
        """
        rows, length = segments.shape
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        number = begins.flatten().cumsum(0) - 1  # of each token's sequence
        start = begins.flatten().nonzero()[:, 0]
        sizes = torch.diff(start, append=start.new_tensor([rows * length]))
        longest_first = sizes.argsort(descending=True, stable=True)
        rank = longest_first.argsort()
        place = torch.arange(rows * length, device=x.device) - start[number]
        order = (place * len(sizes) + rank[number]).argsort()
        state = None
        if before is not None:
            begun = before.new_zeros(len(sizes), before.shape[1])
            begun[number.view(rows, length)[:, 0]] = before
            state = self._unfold(begun[longest_first])
        packed = PackedSequence(x.flatten(0, 1)[order], place.bincount().cpu())
        out, state = self.rnn(packed, state)
        hidden = torch.empty_like(out.data).index_copy(0, order, out.data).view(rows, length, -1)
        return hidden, self._fold(state)[rank[number.view(rows, length)[:, -1]]]

    def _fold(self, state: Any) -> Tensor:
        """The layers' states (L, B, D), one kind or two, as one vector a row (B, parts * L * D)."""
        kinds = torch.cat(state) if self.parts == 2 else state
        return kinds.transpose(0, 1).flatten(1)

    def _unfold(self, vectors: Tensor | None) -> Any:
        """What ``_fold`` made one of."""
        if vectors is None:
            return None
        kinds = vectors.unflatten(1, (-1, self.model.width)).transpose(0, 1).contiguous()
        return tuple(part.contiguous() for part in kinds.chunk(2)) if self.parts == 2 else kinds
