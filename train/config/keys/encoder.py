"""The keys of a bidirectional encoder: BERT."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train.config.keys.base import ENCODER_TOKENS, Above0, Positive, Transformer, not_divided, too_long


class Encoder(Transformer):
    """A bidirectional encoder, normalised after each sum: BERT."""

    objectives = ("masked", "classify")
    special = ENCODER_TOKENS
    kv_heads: ClassVar[None] = None
    head_dim: ClassVar[None] = None
    norm: ClassVar[Literal["layer_norm"]] = "layer_norm"
    bias: ClassVar[bool] = True
    norm_first: ClassVar[bool] = False
    scaled: ClassVar[bool] = True

    family: Literal["encoder"]
    max_len: Positive = Field(description="longest sequence, in tokens, that positions are made for")
    types: Positive = Field(2, description="kinds of text in a row, each with an embedding: the two of a pair")
    activation: Literal["sigmoid", "tanh", "relu", "gelu", "gelu_exact", "swiglu", "geglu"] = Field(
        "gelu",
        description="in the MLP; gelu is the tanh approximation, gelu_exact its original, the two -glu are gated",
    )
    tied: bool = Field(True, description="the head shares the token embedding")
    norm_eps: Above0 = 1e-12

    def problems(self, seq_len: int) -> list[str]:
        """See ``Family.problems``: head size, positions, types."""
        return [*too_long(seq_len, self.max_len), *not_divided(self.width, self.heads)]
