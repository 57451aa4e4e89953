"""Keys of the encoder-decoder, with settings for T5 and the original Transformer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train.config.keys.base import ENCDEC_TOKENS, InitStd, Positive, Transformer, heads_problem


class EncDec(Transformer):
    """Keys of an encoder-decoder, such as T5 and the original Transformer."""

    objectives = ("seq2seq", "classify")
    special = ENCDEC_TOKENS
    mean_pooling = False
    kv_heads: ClassVar[None] = None

    family: Literal["encdec"]
    init_std: InitStd = None
    head_dim: Positive | None = Field(None, description="features of a head; default: width / heads")
    position: Literal["relative", "sinusoidal"] = Field(
        description="relative: a bias of the scores, as T5's; sinusoidal: added to embeddings times sqrt(width)"
    )
    buckets: Positive = Field(32, description="distances that relative positions tell apart")
    max_distance: Positive = Field(128, description="tokens apart beyond which relative positions are one")
    norm: Literal["layer_norm", "rms_norm"]
    norm_first: bool = Field(description="each sublayer's input is normalised, else the sum after it")
    scaled: bool = Field(description="scores are divided by sqrt(head_dim), which T5 leaves out")
    activation: Literal["sigmoid", "tanh", "relu", "gelu", "gelu_exact", "swiglu", "geglu"] = Field(
        description="in the MLP; gelu is the tanh approximation, gelu_exact its original, the two -glu are gated"
    )
    bias: bool = Field(description="biases in linear layers and layer norms")

    def problems(self, seq_len: int) -> list[str]:
        """See ``Family.problems``: head size and position buckets."""
        problems = super().problems(seq_len)
        problems += [] if self.head_dim else heads_problem(self.width, self.heads)
        if self.position == "relative" and (self.buckets % 4 or self.max_distance <= self.buckets // 2):
            problems.append(
                f"model.buckets={self.buckets} must be a multiple of 4, and "
                f"model.max_distance={self.max_distance} more than half of it"
            )
        if self.position == "sinusoidal" and self.width % 2:
            problems.append(f"sinusoidal positions come in pairs, but model.width={self.width} is odd")
        return problems
