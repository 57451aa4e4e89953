"""Keys of the bidirectional encoder: BERT."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train.config.keys.base import ENCODER_TOKENS, Above0, Positive, Transformer, heads_problem, length_problem


class Encoder(Transformer):
    """Keys of a bidirectional encoder with post-norm blocks, such as BERT."""

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
        return [
            *super().problems(seq_len),
            *length_problem(seq_len, self.max_len),
            *heads_problem(self.width, self.heads),
        ]
