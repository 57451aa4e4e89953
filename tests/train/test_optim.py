"""Groups decided by what a parameter is, and update rules against their formulas."""

import pytest
import torch

from train.objectives import build_objective
from train.optim import build_optimizer, parameter_groups
from train.schema import Optimizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt_tiny", "llama_tiny"])
def test_only_matrices_decay(make_config, name, tied):
    objective = build_objective(make_config(name, tied=tied), 257)
    matrices, rest = parameter_groups(objective, 0.1)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    decayed = set(matrices["names"])
    for path in decayed:
        assert path.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight", "head.weight"))
    assert ("head.weight" in decayed) is not tied
    assert all(path.endswith("bias") or "norm" in path or "embed" in path or "positions" in path for path in rest["names"])
    named = dict(objective.named_parameters())
    assert sorted(decayed | set(rest["names"])) == sorted(named)
    for group in (matrices, rest):
        assert all(named[path] is p for path, p in zip(group["names"], group["params"], strict=True))


def test_a_parameter_that_has_no_shape_at_rest_is_judged_by_its_owner(make_config):
    objective = build_objective(make_config(), 257)
    before = [group["names"] for group in parameter_groups(objective, 0.1)]
    for parameter in objective.parameters():
        parameter.data = torch.empty(0)
    assert [group["names"] for group in parameter_groups(objective, 0.1)] == before


def test_frozen_parameters_are_left_out_and_empty_groups_too(make_config):
    objective = build_objective(make_config(), 257)
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_("norm" in name)
    (group,) = parameter_groups(objective, 0.1)
    assert group["name"] == "rest"


def by_hand(kind, weight, gradients, lr, decay):
    """The rules as their papers write them, in float64."""
    m = v = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        g = gradient if kind == "adamw" else gradient + decay * weight
        if kind in ("sgd", "momentum"):
            m = (0.8 if kind == "momentum" else 0.0) * m + g
            weight = weight - lr * m
            continue
        if kind == "adamw":
            weight = weight - lr * decay * weight
        m, v = 0.7 * m + 0.3 * g, 0.95 * v + 0.05 * g * g
        weight = weight - lr * (m / (1 - 0.7**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
    return weight


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw"])
def test_update_rules_equal_their_formulas(kind):
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(6))
    parameter = torch.nn.Parameter(start.float())
    chosen = Optimizer(name=kind, lr=0.1, betas=(0.7, 0.95), eps=1e-6, momentum=0.8)
    optimizer = build_optimizer(chosen, [{"params": [parameter], "weight_decay": 0.2, "name": "matrices", "names": ["w"]}])
    for gradient in gradients:
        parameter.grad = gradient.float()
        optimizer.step()
    assert torch.allclose(parameter.double(), by_hand(kind, start, gradients, 0.1, 0.2), atol=1e-5)
