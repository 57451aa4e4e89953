"""Protocols of backbones: the methods that objectives use of any model family, or of some families."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from train.batch import Batch
from train.config.keys.base import Family
from train.models.layers import Embedding


class Backbone(Protocol):
    """A model family's module (an ``nn.Module``): token embedding and layers, without a head."""

    embed: Embedding
    model: Family

    def __call__(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden states (B, T, D) for a head to read. With ``isolate`` no token sees another segment of its row."""

    def pooled(self, batch: Batch, isolate: bool = True) -> Tensor:
        """One vector per row, (B, D)."""

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """FLOPs of matrix products, forward and backward, per token of rows of ``seq_len``, without the head."""


class GenerativeBackbone(Backbone, Protocol):
    """A backbone that text can be sampled from: see ``train.models.generation_api.Generative``."""

    max_len: int

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Read prompts (B, T) of ``lengths`` (B,) tokens: the last hidden states (B, D), and a ``DecodingState``."""

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one more token (B,) per row: its hidden state (B, D), and the state after it."""


class EncDecBackbone(GenerativeBackbone, Protocol):
    """An encoder-decoder; its hidden states are those of the target (B, U, D)."""

    head_scale: float
    """Factor on hidden states before the output matrix (T5 scales them where the matrix is the embedding)."""

    def flops_per_token(self, seq_len: int, causal: bool, targets: float = 1.0) -> float:
        """FLOPs per token of the source, with ``targets`` tokens of the target for each."""


class BidirectionalBackbone(Backbone, Protocol):
    """An encoder whose first token, through ``pooler``, stands for the row."""

    model: Any
    pooler: Any
    """An ``nn.Module`` (B, T, D) -> (B, D), or None where no objective trains it."""


class CarryingBackbone(GenerativeBackbone, Protocol):
    """A recurrent backbone whose rows can continue from their final hidden state in the previous step."""

    def enable_carry(self, rows: int) -> None:
        """Carry a hidden state from step to step for each of the ``rows`` of the global batch from now on."""
