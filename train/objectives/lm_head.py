"""Language-model head: the output matrix over the vocabulary, and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernels
from train.batch import IGNORE
from train.config.keys.objectives import Smoothed
from train.models.layers import Embedding


class LMHead(nn.Module):
    """Output matrix (V, D): its own, or the token embedding's parameter where the model is tied.

    A tied parameter is registered here too, so that ZeRO-3 gathers it for this module's forward as for the embedding's.
    ``named_parameters`` lists it under the embedding's name alone; in ``state_dict`` both names share one storage.
    """

    def __init__(
        self, embed: Embedding, tied: bool, objective: Smoothed, scale: float = 1.0, init_std: float | None = None
    ) -> None:
        """Hidden states are multiplied by ``scale``; ``init_std`` of an untied matrix is by default the embedding's."""
        super().__init__()
        self.regularisers = {"label_smoothing": objective.label_smoothing, "z_loss": objective.z_loss}
        self.init_std, self.scale = init_std or embed.init_std, scale
        self.weight = embed.weight if tied else nn.Parameter(torch.empty_like(embed.weight))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Any:
        """Logits (..., V) of hidden (..., D); or, given targets of its leading shape, (sum, count, loss of each).

        In training the loss has the objective's label smoothing and z-loss; in evaluation it is the bare cross-entropy.
        """
        hidden = hidden if self.scale == 1.0 else hidden * self.scale
        if targets is None:
            return nn.functional.linear(hidden, self.weight)
        regularisers = self.regularisers if self.training else {}
        return kernels.linear_cross_entropy_by_target(
            hidden.flatten(0, -2), self.weight, targets.flatten(), ignore_index=IGNORE, **regularisers
        )
