"""The optimizer of a run and the groups of parameters it treats apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train import schema
from train.models.layers import Norm

UNDECAYED = (nn.Embedding, Norm, nn.LayerNorm, nn.RMSNorm)
"""Modules whose parameters are never decayed; nor is any bias. A tied head is its embedding."""

Group = dict[str, Any]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[Group]:
    """Trainable parameters in at most two groups, {"name", "names", "params", "weight_decay"}: matrices, and the rest.

    Decided by the module that owns a parameter, never by its shape: under ZeRO-3 a parameter at rest has none.
    """
    matrices: Group = {"name": "matrices", "names": [], "params": [], "weight_decay": weight_decay}
    rest: Group = {"name": "rest", "names": [], "params": [], "weight_decay": 0.0}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            group = rest if leaf == "bias" or isinstance(owner, UNDECAYED) else matrices
            group["names"].append(f"{path}.{leaf}" if path else leaf)
            group["params"].append(parameter)
    return [group for group in (matrices, rest) if group["params"]]


def build_optimizer(optimizer: schema.Optimizer, groups: list[Group]) -> torch.optim.Optimizer:
    """The update rule over ``groups``, starting at its peak rate; the loop sets ``lr`` every step.

    ``adam`` adds weight decay to the gradient (L2, Kingma and Ba 2015); ``adamw`` decays the weights themselves
    (Loshchilov and Hutter 2019). torch's fused kernels: one pass over memory, on CPU and GPU.
    """
    if optimizer.name == "sgd":
        return torch.optim.SGD(groups, lr=optimizer.lr, fused=True)
    if optimizer.name == "momentum":
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum, fused=True)
    rule = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer.name]
    return rule(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
