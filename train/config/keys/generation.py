"""Keys of generated text: how it is drawn, and where it ends."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from train.config.keys.base import Fraction, NonNegative, Positive, Section


class GenerationConfig(Section):
    """Decoding settings of generated text."""

    prompts: list[str] | None = Field(
        None,
        description="what the samples of a run start with; default: of data=stdlib `def` and `class`, "
        "else the start of a document",
    )
    max_tokens: NonNegative = Field(
        200, description="tokens of a text at most; it also ends where the model's max_len is full"
    )
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="0: greedy")
    top_k: NonNegative = Field(0, description="draw from the k likeliest tokens only; 0: from all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="draw from the likeliest that make up this share"
    )
    min_p: Fraction = Field(0.0, description="leave out what is less likely than this share of the likeliest")
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(
        1.0, description="above 1: tokens that were there are less likely"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="a text ends before the first of these strings"
    )
    seed: NonNegative = Field(
        0, description="a text is a function of it, the prompt and the options, whatever runs beside it"
    )
    n: Positive = Field(1, description="texts a prompt: as many draws, or the best of the beams")
    beams: Positive = Field(1, description="above 1: beam search for the likeliest text, nothing is drawn")
    length_penalty: float = Field(1.0, description="beams compare sums of log-probabilities over length to this power")
    batch: Positive = Field(16, description="prompts that run at a time")
