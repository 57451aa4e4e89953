"""Optimizers that torch lacks, or builds in a way that ZeRO cannot shard, by the formulas of their papers.

Under ZeRO a "parameter" is a flat tensor of many: every operation here is elementwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Lion (Chen et al. 2023, algorithm 2): sign of an average of gradient and momentum, with decoupled weight decay.

    update = sign(beta1 m + (1 - beta1) g);   w -= lr (update + decay w);   m = beta2 m + (1 - beta2) g
    """

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params, grads, means = _with_state(self, group["params"], "exp_avg")
            if params:
                directions = torch._foreach_lerp(means, grads, 1 - group["betas"][0])
                torch._foreach_sign_(directions)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, directions, alpha=-group["lr"])
                torch._foreach_lerp_(means, grads, 1 - group["betas"][1])


class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011): rates that shrink with the sum of squared gradients; L2 weight decay.

        s += g^2;   w -= lr g / (sqrt(s) + eps)

    torch's allocates its sums when built, for parameters that ZeRO then replaces; DeepSpeed builds another in its
    place, which has lost the groups.
    """

    def __init__(self, groups: Any, lr: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params, grads, sums = _with_state(self, group["params"], "sum")
            if params:
                if group["weight_decay"]:
                    grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
                torch._foreach_addcmul_(sums, grads, grads)
                roots = torch._foreach_sqrt(sums)
                torch._foreach_add_(roots, group["eps"])
                torch._foreach_addcdiv_(params, grads, roots, value=-group["lr"])


def _with_state(rule: Optimizer, params: list[Tensor], kind: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, their gradients, and their states of one kind (zeros at first)."""
    mine = [p for p in params if p.grad is not None]
    for p in mine:
        if kind not in rule.state[p]:
            rule.state[p][kind] = torch.zeros_like(p)
    return mine, [p.grad for p in mine if p.grad is not None], [rule.state[p][kind] for p in mine]
