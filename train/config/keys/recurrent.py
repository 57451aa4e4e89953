"""Keys of the recurrent networks: RNN, LSTM and GRU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.config.keys.base import Family


class Recurrent(Family):
    """Keys of a recurrent network: RNN, LSTM or GRU."""

    objectives = ("causal", "classify")

    family: Literal["recurrent"]
    cell: Literal["rnn", "lstm", "gru"] = Field(description="kind of the recurrent layers")
    activation: Literal["tanh", "relu"] = Field("tanh", description="of the cell rnn; lstm and gru have their own")
    carry: bool = Field(
        True, description="a row goes on from the memory that the row before it in its stream ended with"
    )

    @property
    def carries_state(self) -> bool:
        """Whether rows carry state: the key ``carry``."""
        return self.carry

    def problems(self, seq_len: int) -> list[str]:
        """See ``Family.problems``: activation and cell."""
        if self.cell == "rnn" or self.activation == "tanh":
            return []
        return [f"model.activation={self.activation} is for model.cell=rnn: a {self.cell} has activations of its own"]
