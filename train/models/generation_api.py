"""Protocols between models and the sampler: the methods a family needs so that it can generate text.

``prefill`` reads the prompts, ``decode`` one more token per row. Between them a model carries an opaque state: KV
caches, the encoder's output, hidden states. Sampler and beam search only select rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn


class DecodingState(Protocol):
    """State of B rows that a model carries from token to token."""

    def rows(self, index: Tensor) -> Self:
        """State whose row i is row index[i] of this one, index (N,) int64: rows may be dropped, reordered and repeated.

        Shares no memory that ``decode`` writes, neither with this state nor between its rows.
        """


@runtime_checkable
class Generative(Protocol):
    """A module that can generate text; modules that cannot have no ``prefill``."""

    @property
    def max_len(self) -> int:
        """The longest sequence in tokens: of prompt and text together, or of each where the text answers the prompt."""

    @property
    def continues(self) -> bool:
        """Whether the text continues the prompt (decoder, recurrent) or answers it (encoder-decoder)."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the module, as ``nn.Module.parameters``."""

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Read prompts (B, T), row b holding lengths[b] >= 1 tokens and then padding.

        An encoder-decoder takes the last token of a prompt as the first token of its target. ``capacity`` is how many
        tokens a row may hold in the end: prompt and text, or the text alone where it answers the prompt. Returns the
        logits (B, V) of each row's next token, and the decoding state.
        """

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one more token (B,) per row: the next logits (B, V), and the state after it; ``state`` is used up."""
