"""Builds the optimizer of a run and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.config import schema
from train.models.layers import Norm
from train.optim.muon import Muon
from train.optim.optimizers import Adagrad, Lion

UNDECAYED = (nn.Embedding, Norm, nn.LayerNorm, nn.RMSNorm)
"""Modules whose parameters are never decayed; nor is any bias. A tied head is its embedding."""

Group = dict[str, Any]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[Group]:
    """Trainable parameters in at most two groups: matrices with weight decay, and the rest without.

    Each is {"name", "names", "params", "weight_decay"}. The module that owns a parameter decides, never its shape:
    under ZeRO-3 a parameter at rest has none.
    """
    matrices: Group = {"name": "matrices", "names": [], "params": [], "weight_decay": weight_decay}
    rest: Group = {"name": "rest", "names": [], "params": [], "weight_decay": 0.0}
    grouped: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in grouped or not parameter.requires_grad:
                continue
            grouped.add(id(parameter))
            group = rest if leaf.startswith("bias") or isinstance(owner, UNDECAYED) else matrices
            group["names"].append(f"{path}.{leaf}" if path else leaf)
            group["params"].append(parameter)
    return [group for group in (matrices, rest) if group["params"]]


def build_optimizer(optimizer: schema.OptimizerConfig, groups: list[Group]) -> torch.optim.Optimizer:
    """The optimizer over ``groups`` at its peak learning rate; the loop sets ``lr`` every step.

    Weight decay is decoupled for ``adamw`` (Loshchilov and Hutter 2019), ``lion`` and ``muon``, and added to the
    gradient (L2) by all others. torch's fused implementations are used where there are any, on CPU and GPU.
    """
    o = optimizer
    match o.name:
        case "sgd":
            return torch.optim.SGD(groups, lr=o.lr, fused=True)
        case "momentum" | "nesterov":
            return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.name == "nesterov", fused=True)
        case "adam" | "adamw":
            rule = torch.optim.Adam if o.name == "adam" else torch.optim.AdamW
            return rule(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
        case "adagrad":
            return Adagrad(groups, o.lr, o.eps)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=o.lr, alpha=o.betas[1], eps=o.eps)
        case "lion":
            return Lion(groups, o.lr, o.betas)
        case "muon":
            return Muon(split_matrices(groups, o.momentum), lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def split_matrices(groups: list[Group], momentum: float) -> list[Group]:
    """Split off the backbone's matrices into groups with a ``momentum``, which Muon orthogonalises.

    Embeddings and heads stay with AdamW: their rows belong to tokens, and few rows get a gradient in a step.
    """
    split: list[Group] = []
    for group in groups:
        with_momentum: Group = {**group, "momentum": momentum, "names": [], "params": []}
        rest: Group = {**group, "names": [], "params": []}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            is_matrix = group["name"] == "matrices" and name.startswith("backbone.") and parameter.ndim == 2
            part = with_momentum if is_matrix else rest
            part["names"].append(name)
            part["params"].append(parameter)
        split += [part for part in (with_momentum, rest) if part["params"]]
    return split
