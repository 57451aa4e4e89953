"""Keys of the size of a step's batch, and the sizes that a ramp has before it is reached."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from train.config.keys.base import Positive, Section

RampStage = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class BatchConfig(Section):
    """Size of one optimizer step's batch."""

    global_: Positive = Field(alias="global", description="sequences per optimizer step, over all workers")
    ramp: Annotated[list[RampStage], Field(min_length=1)] | None = Field(
        None, description="[[8,100],[16,300]]: 8 sequences up to step 100, 16 up to step 300, then batch.global"
    )
    ramp_by: Literal["steps", "tokens"] | None = Field(
        None, description="what batch.ramp's second numbers count, from the start of the run; default: steps"
    )
    micro: Positive | None = Field(None, description="sequences per forward pass; default: a worker's whole share")
    seq_len: Positive = Field(description="tokens per sequence")

    @property
    def ramp_steps(self) -> tuple[tuple[int, int], ...]:
        """The ramp as (sequences per step, steps of that size), in order; empty without one.

        A stage that ends after so many tokens has the fewest steps with which the run has read them, padding included.
        """
        stages, reached = [], 0
        for rows, end in self.ramp or []:
            each = rows * self.seq_len if self.ramp_by == "tokens" else 1
            steps = max(0, -(-(end - reached) // each))
            stages.append((rows, steps))
            reached += steps * each
        return tuple(stages)

    @property
    def default_streams(self) -> int:
        """Streams of an epoch where ``data.streams`` is left out: the most that divide every size of the batch."""
        return math.gcd(self.global_, *(rows for rows, _ in self.ramp_steps))

    def sequences(self, steps: int) -> int:
        """Sequences of the run's first ``steps`` optimizer steps."""
        total = 0
        for rows, length in self.ramp_steps:
            made = min(steps, length)
            total, steps = total + made * rows, steps - made
        return total + steps * self.global_
