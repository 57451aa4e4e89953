"""Tests of parameter groups, and of optimizers against their formulas."""

import itertools
from typing import get_args

import pytest
import torch

from train.config.schema import OptimizerConfig
from train.objectives import build_objective
from train.optim.factory import build_optimizer, parameter_groups, split_matrices
from train.optim.muon import muon_update, orthogonalize


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt_tiny", "llama_tiny"])
def test_parameter_groups_decay_matrices_only(make_config, name, tied):
    objective = build_objective(make_config(name, tied=tied), 257)
    matrices, rest = parameter_groups(objective, 0.1)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    decayed = set(matrices["names"])
    for path in decayed:
        assert path.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight", "head.weight"))
    assert ("head.weight" in decayed) is not tied
    assert all(
        path.endswith("bias") or "norm" in path or "embed" in path or "positions" in path for path in rest["names"]
    )
    named = dict(objective.named_parameters())
    assert sorted(decayed | set(rest["names"])) == sorted(named)
    for group in (matrices, rest):
        assert all(named[path] is p for path, p in zip(group["names"], group["params"], strict=True))


def test_parameter_without_a_shape_is_grouped_by_its_module(make_config):
    objective = build_objective(make_config(), 257)
    before = [group["names"] for group in parameter_groups(objective, 0.1)]
    for parameter in objective.parameters():
        parameter.data = torch.empty(0)
    assert [group["names"] for group in parameter_groups(objective, 0.1)] == before


def test_parameter_groups_leave_out_frozen_parameters_and_empty_groups(make_config):
    objective = build_objective(make_config(), 257)
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_("norm" in name)
    (group,) = parameter_groups(objective, 0.1)
    assert group["name"] == "rest"


def by_hand(name, weight, gradients, lr, decay):
    """Weights after the updates of an optimizer, as its paper writes them, in float64."""
    m = v = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        decoupled = name in ("adamw", "lion", "muon")
        g = gradient if decoupled else gradient + decay * weight
        weight = weight - lr * decay * weight if decoupled else weight
        if name in ("sgd", "momentum", "nesterov"):
            m = (0.0 if name == "sgd" else 0.8) * m + g
            weight = weight - lr * (g + 0.8 * m if name == "nesterov" else m)
        elif name == "adagrad":
            v = v + g * g
            weight = weight - lr * g / (v.sqrt() + 1e-6)
        elif name == "rmsprop":
            v = 0.95 * v + 0.05 * g * g
            weight = weight - lr * g / (v.sqrt() + 1e-6)
        elif name == "lion":
            weight = weight - lr * (0.7 * m + 0.3 * g).sign()
            m = 0.95 * m + 0.05 * g
        elif name == "muon":
            m = 0.8 * m + 0.2 * g
            weight = weight - lr * 0.2 * max(weight.shape) ** 0.5 * newton_schulz(0.8 * m + 0.2 * g)
        else:
            m, v = 0.7 * m + 0.3 * g, 0.95 * v + 0.05 * g * g
            weight = weight - lr * (m / (1 - 0.7**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
    return weight


def newton_schulz(matrix):
    """Five quintic iterations on the singular values themselves: x -> a x + b x^3 + c x^5."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    S = S / S.square().sum().sqrt()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U @ S.diag() @ V


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
@pytest.mark.parametrize("name", get_args(OptimizerConfig.model_fields["name"].annotation))
def test_optimizer_updates_equal_their_formulas(name, shape):
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(6))
    parameter = torch.nn.Parameter(start.float())
    chosen = OptimizerConfig(name=name, lr=0.1, betas=(0.7, 0.95), eps=1e-6, momentum=0.8)
    group = {"params": [parameter], "weight_decay": 0.2, "name": "matrices", "names": ["backbone.w"]}
    optimizer = build_optimizer(chosen, [group])
    for gradient in gradients:
        parameter.grad = gradient.float()
        optimizer.step()
    assert torch.allclose(
        parameter.double(), by_hand(name, start, gradients, 0.1, 0.2), atol=1e-4 if name == "muon" else 1e-5
    )


TORCH_OPTIMIZERS = {
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-6, weight_decay=0.2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.95, eps=1e-6, weight_decay=0.2),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1, momentum=0.8, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
}


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_optimizers_that_torch_has_equal_torch(name):
    generator = torch.Generator().manual_seed(1)
    parameter, reference = (torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    chosen = OptimizerConfig(name=name, lr=0.1, betas=(0.7, 0.95), eps=1e-6, momentum=0.8)
    group = {"params": [parameter], "weight_decay": 0.2, "name": "matrices", "names": ["backbone.w"]}
    optimizers = [build_optimizer(chosen, [group]), TORCH_OPTIMIZERS[name]([reference])]
    for _ in range(4):
        parameter.grad = torch.randn(24, 16, generator=generator)
        reference.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(parameter, reference, atol=3e-2 if name == "muon" else 1e-6), "torch's Muon works in bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (64, 16), (16, 64), (1, 9)])
def test_muon_update_is_near_orthogonal_and_as_large_as_adamw(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, dtype))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(shape), dtype), torch.zeros(shape))
    if min(shape) > 1:
        assert 0.1 < muon_update(matrix, dtype).square().mean().sqrt() < 0.3


def test_muon_iterations_in_bf16_point_where_those_in_fp32_do():
    matrix = torch.randn(48, 160, generator=torch.Generator().manual_seed(0))
    fp32, bf16 = (orthogonalize(matrix, dtype).flatten() for dtype in (torch.float32, torch.bfloat16))
    assert torch.cosine_similarity(fp32, bf16, dim=0) > 0.999


def test_biases_of_recurrent_layers_are_not_decayed(make_config):
    matrices, rest = parameter_groups(build_objective(make_config("lstm_tiny"), 257), 0.1)
    assert not any("bias" in name for name in matrices["names"])
    assert sum("bias" in name for name in rest["names"]) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_muon_orthogonalises_matrices_of_the_backbone_only(make_config, tied):
    objective = build_objective(make_config("gpt_tiny", tied=tied), 257)
    groups = split_matrices(parameter_groups(objective, 0.1), 0.9)
    with_momentum = [group["names"] for group in groups if "momentum" in group]
    orthogonalised = list(itertools.chain(*with_momentum))
    assert len(orthogonalised) == 4 * len(objective.backbone.blocks)
    assert all(name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight")) for name in orthogonalised)
    all_names = itertools.chain(*(group["names"] for group in groups))
    assert sorted(all_names) == sorted(name for name, _ in objective.named_parameters())
    assert [g["weight_decay"] for g in groups if "head.weight" in g["names"]] == ([] if tied else [0.1])
    named = dict(objective.named_parameters())
    for group in groups:
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))
