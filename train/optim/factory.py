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
    """Trainable parameters in at most two groups, {"name", "names", "params", "weight_decay"}: decayed matrices, and
    the rest.

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
            group = rest if leaf.startswith("bias") or isinstance(owner, UNDECAYED) else matrices
            group["names"].append(f"{path}.{leaf}" if path else leaf)
            group["params"].append(parameter)
    return [group for group in (matrices, rest) if group["params"]]


def build_optimizer(optimizer: schema.Optimizer, groups: list[Group]) -> torch.optim.Optimizer:
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
            return Muon(with_matrices(groups, o.momentum), lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def with_matrices(groups: list[Group], momentum: float) -> list[Group]:
    """Split off the backbone's matrices into groups with a ``momentum``, which Muon orthogonalises.

    Embeddings and heads stay with AdamW: their rows belong to tokens, and few rows get a gradient in a step.
    """
    found = []
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        decayed = group["name"] == "matrices"
        turned = [(name, p) for name, p in pairs if decayed and name.startswith("backbone.") and p.ndim == 2]
        rest = [(name, p) for name, p in pairs if name not in {n for n, _ in turned}]
        for part, more in ((turned, {"momentum": momentum}), (rest, {})):
            if part:
                found.append({**group, **more, "names": [name for name, _ in part], "params": [p for _, p in part]})
    return found
