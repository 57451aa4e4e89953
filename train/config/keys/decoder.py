"""Keys of the decoder-only transformer, with settings for GPT-2 and Llama."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train.config.keys.base import Above0, Positive, Transformer, heads_problem, length_problem


class Decoder(Transformer):
    """Keys of a decoder-only transformer, such as GPT-2 and Llama."""

    objectives = ("causal", "classify")
    head_dim: ClassVar[None] = None
    norm_first: ClassVar[bool] = True
    scaled: ClassVar[bool] = True

    family: Literal["decoder"]
    kv_heads: Positive | None = Field(None, description="heads of keys and values; default: heads")
    max_len: Positive = Field(description="longest sequence, in tokens, that positions are made for")
    position: Literal["learned", "rope"]
    norm: Literal["layer_norm", "rms_norm"]
    activation: Literal["sigmoid", "tanh", "relu", "gelu", "gelu_exact", "swiglu", "geglu"] = Field(
        description="in the MLP; gelu is the tanh approximation, gelu_exact its original, the two -glu are gated"
    )
    bias: bool = Field(description="biases in linear layers and layer norms")
    rope_theta: Above0 = 10000.0

    def problems(self, seq_len: int) -> list[str]:
        """See ``Family.problems``: head size, positions, grouped heads."""
        problems = [*super().problems(seq_len), *length_problem(seq_len, self.max_len)]
        problems += heads_problem(self.width, self.heads)
        if self.position == "rope" and not self.width % self.heads and self.width // self.heads % 2:
            problems.append(
                f"rope turns pairs, but model.width/model.heads is {self.width // self.heads}, which is odd"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            problems.append(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")
        return problems
