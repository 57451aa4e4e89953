"""Recurrent networks on torch's layers: RNN, LSTM and GRU.

RNN: Elman 1990. LSTM: Hochreiter and Schmidhuber 1997. GRU: Cho et al. 2014.

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
    """Decoding state: the hidden state (L, B, D), and for an LSTM its cell state, (L, B, D) each."""

    hidden: Any

    def rows(self, index: Tensor) -> RecurrentState:
        """State whose row i is row index[i] of this one."""
        states = self.hidden if isinstance(self.hidden, tuple) else (self.hidden,)
        chosen = tuple(state[:, index] for state in states)
        return RecurrentState(chosen if len(chosen) > 1 else chosen[0])


class SyncGradOrder(torch.autograd.Function):
    """Identity that, in the backward pass, collects the gradients of all arguments and passes them on in fixed order.

    The graph of recurrent layers depends on the documents of a rank, and with it the order in which their gradients are
    ready. ZeRO-2 reduces its buckets as they fill: it would add one weight's gradient to another's.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return the weights unchanged."""
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """The gradients, in the order of the weights."""
        return grads


class OrderedGradRNN(nn.RNNBase):
    """Recurrent layers whose gradients are ready in the same order on every rank."""

    def forward(self, *arguments: Any) -> Any:
        """Forward pass of torch's layer, with gradients ordered by ``SyncGradOrder``."""
        own = self._flat_weights
        self._flat_weights = list(SyncGradOrder.apply(*own))
        try:
            return super().forward(*arguments)
        finally:
            self._flat_weights = own


class RNN(OrderedGradRNN, nn.RNN):
    """nn.RNN with a rank-independent gradient order."""


class LSTM(OrderedGradRNN, nn.LSTM):
    """nn.LSTM with a rank-independent gradient order."""


class GRU(OrderedGradRNN, nn.GRU):
    """nn.GRU with a rank-independent gradient order."""


class Recurrent(nn.Module):
    """Token embedding and recurrent layers, without a head."""

    def __init__(self, model: keys.Recurrent, vocab_size: int) -> None:
        """``vocab_size`` is the number of rows of the embedding, padding included."""
        super().__init__()
        self.model = model
        self.max_len = sys.maxsize
        self.embed = Embedding(vocab_size, model.width, model.width**-0.5)
        layer_class = {"rnn": RNN, "lstm": LSTM, "gru": GRU}[model.cell]
        options: dict[str, Any] = {"nonlinearity": model.activation} if model.cell == "rnn" else {}
        options["dropout"] = model.dropout if model.layers > 1 else 0.0  # between layers
        self.rnn: Any = layer_class(model.width, model.width, model.layers, batch_first=True, **options)
        self.rnn.init_std = (3 * model.width) ** -0.5  # the deviation of torch's own, uniform in +-1 / sqrt(width)
        self.parts = 2 if model.cell == "lstm" else 1
        self.memory: CarriedState | None = None

    def enable_carry(self, rows: int) -> None:
        """Start each of the ``rows`` of a step from the final hidden state of the same row in the previous step."""
        self.memory = CarriedState(rows, self.parts * self.model.layers * self.model.width)

    def forward(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden states (B, T, D). With ``isolate`` every segment starts from a zero hidden state.

        Except the first segment of a row that goes on from the row before it in its stream, where rows carry state.
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
            memory.stage_vectors(batch["memory"], after)
        return dropout(hidden, self.model.dropout, self.training)

    def pooled(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden state (B, D) of each row's last token."""
        return last_token(self(batch, isolate), batch)

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, RecurrentState]:
        """Read padded prompts (B, T) of ``lengths`` (B,) tokens: the last layer's final hidden state, and the state."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self._embedded(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, hidden = self.rnn(packed)
        return (hidden[0] if self.parts == 2 else hidden)[-1], RecurrentState(hidden)

    def decode(self, token: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Read one more token (B,) per row: its hidden state (B, D), and the state after it."""
        out, hidden = self.rnn(self._embedded(token[:, None]), state.hidden)
        return out[:, 0], RecurrentState(hidden)

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of matrix products, forward and backward, per token, without the head; independent of ``seq_len``."""
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[self.model.cell]
        return 6.0 * self.model.layers * gates * 2 * self.model.width**2

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, D) of tokens (B, T), scaled to unit deviation, since no norm follows them.

        Where the table is tied to the head, that is the scale of the Transformer (Vaswani et al. 2017, section 3.4).
        """
        return self.embed(tokens) * self.model.width**0.5

    def _apart(self, x: Tensor, segments: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run every segment of every row as its own sequence, in one call: hidden states (B, T, D), rows' final states.

        torch reads a PackedSequence: all first tokens, all second tokens, ..., the longest sequence first.
        """
        rows, length = segments.shape
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        number = begins.flatten().cumsum(0) - 1  # of each token's sequence
        start = begins.flatten().nonzero()[:, 0]
        sizes = torch.diff(start, append=start.new_tensor([rows * length]))
        longest_first = sizes.argsort(descending=True, stable=True)
        rank = longest_first.argsort()
        position = torch.arange(rows * length, device=x.device) - start[number]  # of each token in its sequence
        order = (position * len(sizes) + rank[number]).argsort()
        state = None
        if before is not None:
            begun = before.new_zeros(len(sizes), before.shape[1])
            begun[number.view(rows, length)[:, 0]] = before
            state = self._unfold(begun[longest_first])
        packed = PackedSequence(x.flatten(0, 1)[order], position.bincount().cpu())
        out, state = self.rnn(packed, state)
        hidden = torch.empty_like(out.data).index_copy(0, order, out.data).view(rows, length, -1)
        return hidden, self._fold(state)[rank[number.view(rows, length)[:, -1]]]

    def _fold(self, state: Any) -> Tensor:
        """The layers' states (L, B, D), hidden and for an LSTM cell, as one vector per row (B, parts * L * D)."""
        layers = torch.cat(state) if self.parts == 2 else state
        return layers.transpose(0, 1).flatten(1)

    def _unfold(self, vectors: Tensor | None) -> Any:
        """Inverse of ``_fold``: vectors (B, parts * L * D) to the layers' states."""
        if vectors is None:
            return None
        layers = vectors.unflatten(1, (-1, self.model.width)).transpose(0, 1).contiguous()
        return tuple(part.contiguous() for part in layers.chunk(2)) if self.parts == 2 else layers
