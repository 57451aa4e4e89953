"""RoPE and the activations of an MLP against the float64 reference."""

import pytest
import torch
from helpers import kernel_compare
from helpers.kernel_compare import DEVICE, assert_matches_reference, backends, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.triton_ops.bias_gelu import bias_gelu_backward, bias_gelu_forward
from kernels.triton_ops.gated_mlp import gated_mlp_backward, gated_mlp_forward
from kernels.triton_ops.rope import rope_op

few_examples = settings(kernel_compare.quick, max_examples=8)
widths = st.sampled_from([1, 3, 96, 1000, 1025])
activations = pytest.mark.parametrize("activation", ["silu", "gelu"])


def gated(module, activation):
    return lambda gate, up: module.gated_mlp(gate, up, activation)


@backends
@few_examples
@given(
    dtype=kernel_compare.dtypes,
    layout=kernel_compare.layouts,
    n_rows=st.sampled_from([0, 1, 19]),
    width=widths,
    bias=st.booleans(),
)
def test_bias_gelu_equals_reference(backend, dtype, layout, n_rows, width, bias):
    inputs = (normal(n_rows, 2, width) * 3, normal(width, seed=1))[: 1 + bias]
    assert_matches_reference(backend, kernels.bias_gelu, reference.bias_gelu, inputs, dtype, layout)


@backends
@activations
@few_examples
@given(dtype=kernel_compare.dtypes, layout=kernel_compare.layouts, n_rows=st.sampled_from([0, 1, 5]), width=widths)
def test_gated_mlp_equals_reference(backend, activation, dtype, layout, n_rows, width):
    gate, up = normal(n_rows, 2, width) * 3, normal(n_rows, 2, width, seed=1)
    assert_matches_reference(
        backend, gated(kernels, activation), gated(reference, activation), (gate, up), dtype, layout
    )


@backends
@activations
def test_gated_mlp_of_tensor_halves_equals_reference(backend, activation):
    def of_halves(module):
        return lambda both: module.gated_mlp(*both.chunk(2, -1), activation)

    assert_matches_reference(backend, of_halves(kernels), of_halves(reference), (normal(2, 3, 48),), torch.float32)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_extreme_values_equal_reference(backend, dtype):
    x = torch.tensor([[-1e4, -30.0, -0.0, 0.0, 1e-30, 30.0, 1e4]], dtype=torch.float64, device=DEVICE)
    assert_matches_reference(backend, kernels.bias_gelu, reference.bias_gelu, (x,), dtype)
    for activation in ("silu", "gelu"):
        assert_matches_reference(
            backend, gated(kernels, activation), gated(reference, activation), (x, torch.ones_like(x)), dtype
        )


@backends
@few_examples
@given(
    dtype=kernel_compare.dtypes,
    layout=kernel_compare.layouts,
    tokens=st.sampled_from([0, 1, 5, 33]),
    heads=st.integers(1, 3),
    half=st.sampled_from([1, 4, 48, 65]),
    shared=st.booleans(),
)
def test_rope_equals_reference(backend, dtype, layout, tokens, heads, half, shared):
    generator = torch.Generator().manual_seed(tokens)
    positions = torch.randint(0, 300, (1 if shared else 2, tokens), generator=generator).to(DEVICE)
    table = kernels.rope_table(positions, 2 * half, 10000.0)

    def float64_rope(x):  # with the float32 angles of a real run, accurate to 300 * 2^-24
        a, b = x.chunk(2, -1)
        return torch.cat((a * table.cos - b * table.sin, b * table.cos + a * table.sin), -1)

    x = normal(2, tokens, heads, 2 * half)
    assert_matches_reference(backend, lambda x: kernels.rope(x, table), float64_rope, (x,), dtype, layout)
    with kernels.force(backend):
        assert torch.allclose(kernels.rope(x, table), reference.rope(x, positions, 10000.0), atol=2e-4)


@backends
def test_rope_of_qkv_views_equals_contiguous_copies(backend):
    qkv, table = normal(2, 5, 6, 8).float(), kernels.rope_table(torch.arange(5, device=DEVICE)[None], 8, 10000.0)
    with kernels.force(backend):
        for part in qkv.split((3, 2, 1), dim=2):
            assert torch.equal(kernels.rope(part, table), kernels.rope(part.contiguous(), table))


@backends
def test_rope_scores_depend_on_distance_only(backend):
    q, k = normal(1, 1, 1, 8).expand(1, 9, 1, 8), normal(1, 1, 1, 8, seed=1).expand(1, 9, 1, 8)
    scores = []
    for start in (0, 50):
        table = kernels.rope_table(start + torch.arange(9, device=DEVICE)[None], 8, 10000.0)
        with kernels.force(backend):
            scores.append(torch.einsum("bqhd,bkhd->qk", kernels.rope(q, table), kernels.rope(k, table)))
    assert torch.allclose(*scores, atol=1e-4)
    assert torch.allclose(scores[0].diagonal(1), scores[0].diagonal(1)[0], atol=1e-4)


def every_op(table):
    """A function of x (2, 5, 3, 8) and bias (8,) that runs all pointwise ops."""
    return lambda x, bias: kernels.gated_mlp(kernels.rope(x, table), kernels.bias_gelu(x, bias), "gelu")


@pytest.fixture
def table():
    return kernels.rope_table(torch.arange(5, device=DEVICE)[None], 8, 10000.0)


def test_pointwise_gradients_pass_gradcheck(table):
    inputs = normal(2, 5, 3, 8).requires_grad_(), normal(8, seed=1).requires_grad_()
    with kernels.force("triton"):
        assert torch.autograd.gradcheck(every_op(table), inputs, fast_mode=True)


def test_pointwise_rerun_or_compiled_is_bit_identical(table):
    inputs = normal(2, 5, 3, 8).float().requires_grad_(), normal(8, seed=1).float().requires_grad_()
    op = every_op(table)
    with kernels.force("triton"):
        runs = op, op, torch.compile(op, backend="aot_eager", fullgraph=True)
        first, *others = [torch.autograd.grad(run(*inputs).sin().sum(), inputs) for run in runs]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_pointwise_ops_pass_opcheck(table):
    x, bias = normal(2, 5, 3, 8).float().requires_grad_(), normal(8, seed=1).float().requires_grad_()
    torch.library.opcheck(bias_gelu_forward, (x, bias))
    torch.library.opcheck(gated_mlp_forward, (x, x.detach() + 1, "silu"))
    torch.library.opcheck(rope_op, (x, *table, False))
    plain = x.detach()
    torch.library.opcheck(bias_gelu_backward, (plain, plain, None))
    torch.library.opcheck(gated_mlp_backward, (plain, plain, plain, "gelu"))
