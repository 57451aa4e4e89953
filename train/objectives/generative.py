"""Base of the objectives that generate text: a backbone and a head over the vocabulary."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.batch import Batch, Losses
from train.models.backbone import GenerativeBackbone
from train.objectives.by_source import losses_by_source
from train.objectives.lm_head import LMHead


class GenerativeObjective(nn.Module):
    """``forward`` gives {"loss": (sum, count)}; ``prefill`` and ``decode`` are those of ``generation_api.Generative``.

    ``vocab_size`` is the tokenizer's: the padding rows of the embedding are never targets, and logits are cut to it.
    """

    sources: tuple[str, ...] = ()
    """Names of the sources of a mixture, by whose numbers the rows of a batch know them."""

    def __init__(self, backbone: GenerativeBackbone, head: LMHead, vocab_size: int, isolate: bool) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.vocab_size, self.isolate = vocab_size, isolate

    def forward(self, batch: Batch) -> Losses:
        """Loss of a batch, in nats, as (sum, count); of a mixture that of each source too."""
        total, count, losses = self.head(self.backbone(batch, self.isolate), batch["targets"])
        return {"loss": (total, count)} | losses_by_source(batch, losses, self.sources)

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, T, vocab_size) of every position that predicts."""
        return self.head(self.backbone(batch, self.isolate))[..., : self.vocab_size]

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Read prompts (B, T), row b holding lengths[b] tokens; room for ``capacity`` tokens per row.

        Returns the logits (B, vocab_size) of each row's next token, and the decoding state.
        """
        hidden, state = self.backbone.prefill(tokens, lengths, capacity)
        return self.head(hidden)[:, : self.vocab_size], state

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one more token (B,) per row: the next logits (B, vocab_size), and the state after it."""
        hidden, state = self.backbone.decode(token, state)
        return self.head(hidden)[:, : self.vocab_size], state

    @property
    def max_len(self) -> int:
        """The longest sequence in tokens: see ``Generative.max_len``."""
        return self.backbone.max_len
