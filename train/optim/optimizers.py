"""Optimizers that torch lacks, or whose implementation in torch ZeRO cannot shard.

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

    torch's Adagrad allocates its sums when it is built, for parameters that ZeRO then replaces; DeepSpeed would build
    another in its place, without the parameter groups.
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


def _with_state(
    optimizer: Optimizer, params: list[Tensor], state_name: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, their gradients, and their state of that name (zeros at first)."""
    updated, grads, states = [], [], []
    for param in params:
        if param.grad is None:
            continue
        if state_name not in optimizer.state[param]:
            optimizer.state[param][state_name] = torch.zeros_like(param)
        updated.append(param)
        grads.append(param.grad)
        states.append(optimizer.state[param][state_name])
    return updated, grads, states
