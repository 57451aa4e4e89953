"""What a family must offer to be sampled from: the contract between models and the sampler, and all of it.

``prefill`` reads the prompts, ``decode`` one more token of every row. Between them a model carries a state, its own affair:
caches of keys and values, the encoder's output, hidden states. Sampler and beam search only choose rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn


class DecodingState(Protocol):
    """What a model carries from token to token, for B rows."""

    def rows(self, index: Tensor) -> Self:
        """The state of which row i is row index[i] of this one: rows may be left out, moved and repeated. index (N,) int64.

        Shares no memory that ``decode`` writes, neither with this state nor between its rows.
        """


@runtime_checkable
class Generative(Protocol):
    """A module that writes; those that do not have no ``prefill``."""

    @property
    def max_len(self) -> int:
        """The longest sequence, in tokens: prompt and text together, or either where the text does not go on from the prompt."""

    @property
    def continues(self) -> bool:
        """Whether the text goes on from the prompt (a decoder, a recurrent model) or answers it (an encoder-decoder)."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of ``nn.Module``."""

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Reads prompts (B, T), row b holding lengths[b] >= 1 tokens and then anything. Where it answers them, the last token of a
        prompt is none of the question: it is what the answer begins with.

        ``capacity`` is how many tokens a row may hold in the end: prompt and text, or the text alone where it answers the prompt.
        Returns the logits (B, V) of each row's next token, and the state to go on from.
        """

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One more token (B,) for each row: the logits (B, V) of the next, and the state after it. The state given is used up."""
