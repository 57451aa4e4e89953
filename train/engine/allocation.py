"""Memory for the parameters of a module that was described on ``meta``; their weights are filled in by the engine."""

from __future__ import annotations

import torch
from torch import nn


def allocate_parameters(module: nn.Module, device: torch.device, dtype: torch.dtype, stage: int) -> None:
    """Replace a module's parameters and buffers on ``meta`` by zeros on ``device``, parameters in ``dtype``.

    At ZeRO ``stage`` 1 to 3 what is trained, and at 3 every parameter, gets its memory from DeepSpeed: until then all
    of its elements are one and the same. Buffers keep their type. Shared parameters stay shared; whether one is
    trained (``requires_grad``) must be decided before.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, described in owner.named_parameters(recurse=False):
            if described not in made:
                by_deepspeed = stage == 3 or (stage > 0 and described.requires_grad)
                zeros = torch.zeros(() if by_deepspeed else described.shape, dtype=dtype, device=device)
                made[described] = nn.Parameter(zeros.expand(described.shape), described.requires_grad)
            setattr(owner, name, made[described])  # torch's recurrent layers keep a second list of their parameters
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.zeros_like(buffer, device=device))
