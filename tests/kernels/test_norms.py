"""LayerNorm and RMSNorm, alone and after dropout and residual add, against the float64 reference."""

import itertools

import pytest
import torch
from helpers import kernel_compare
from helpers.kernel_compare import DEVICE, assert_matches_reference, backends, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import reference, tuning
from kernels.triton_ops import rows
from kernels.triton_ops.layer_norm import layer_norm_backward, layer_norm_forward
from kernels.triton_ops.rms_norm import rms_norm_backward, rms_norm_forward

KINDS = ["rms_norm", "layer_norm"]
WIDTHS = [1, 3, 17, 96, 768, 1000, 4099] if DEVICE == "cpu" else [1, 3, 17, 96, 768, 1000, 4099, 8192, 16384, 18000]
few_examples = settings(kernel_compare.quick, max_examples=6)
MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]
dropouts = st.sampled_from([None, kernels.Dropout(0.3, 5), kernels.Dropout(0.3, 2**62 + 1)])


def plain_and_residual(kind, eps=1e-5, dropout=None):
    """(plain op, its reference, residual form, its reference), functions of x, [residual,] and the parameters."""
    name, no_bias = kind.split()[0], (None,) if "without" in kind else ()

    def plain(module):
        return lambda x, *parameters: getattr(module, name)(x, *parameters, *no_bias, eps)

    def residual(module):
        return lambda x, r, *parameters: getattr(module, f"add_{name}")(x, r, *parameters, *no_bias, eps, dropout)

    return plain(kernels), plain(reference), residual(kernels), residual(reference)


def parameters(kind, width):
    return [normal(width, seed=seed) for seed in ((2, 3) if kind == "layer_norm" else (2,))]


@backends
@pytest.mark.parametrize("kind", [*KINDS, "layer_norm without bias"])
@few_examples
@given(
    dtype=kernel_compare.dtypes,
    layout=kernel_compare.layouts,
    n_rows=st.sampled_from([0, 1, 7]),
    width=st.sampled_from(WIDTHS),
    dropout=dropouts,
)
def test_norms_equal_float64_reference(backend, kind, dtype, layout, n_rows, width, dropout):
    # A nearly constant row has a gradient near 0, lost in rounding: so eps is large for narrow rows.
    eps = 1e-5 if width > 3 else 1.0
    op, reference_op, add_op, add_reference = plain_and_residual(kind, eps, dropout)
    x, residual = normal(n_rows, 2, width) * 3 + 1, normal(n_rows, 2, width, seed=1)
    assert_matches_reference(backend, op, reference_op, (x, *parameters(kind, width)), dtype, layout)
    assert_matches_reference(backend, add_op, add_reference, (x, residual, *parameters(kind, width)), dtype, layout)


@backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", ["normed", "total"])
def test_residual_norm_with_one_used_output_has_right_gradients(backend, kind, out):
    _, _, op, reference_op = plain_and_residual(kind, dropout=kernels.Dropout(0.2, 9))
    index = ["normed", "total"].index(out)
    inputs = normal(5, 24), normal(5, 24, seed=1), *parameters(kind, 24)
    assert_matches_reference(
        backend, lambda *x: op(*x)[index], lambda *x: reference_op(*x)[index], inputs, torch.float32
    )


@backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x_dtype", "r_dtype"), MIXED)
def test_residual_norm_of_mixed_dtypes_returns_promoted_dtype(backend, kind, x_dtype, r_dtype):
    _, _, op, reference_op = plain_and_residual(kind)
    x, r = normal(5, 24).to(x_dtype).requires_grad_(), normal(5, 24, seed=1).to(r_dtype).requires_grad_()
    weights = [w.float().requires_grad_() for w in parameters(kind, 24)]
    exact = [t.detach().double().requires_grad_() for t in (x, r, *weights)]
    with kernels.force(backend):
        normed, total = op(x, r, *weights)
    assert normed.dtype == total.dtype == torch.promote_types(x_dtype, r_dtype)
    (normed.double().sin() + total.double()).sum().backward()
    expected, expected_total = reference_op(*exact)
    (expected.sin() + expected_total).sum().backward()
    kernel_compare.assert_close(total, expected_total, total.dtype)
    for leaf, e in zip((x, r, *weights), exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        kernel_compare.assert_close(leaf.grad, e.grad, torch.bfloat16)


@backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-4, 3.0, 1e4])
def test_norm_of_constant_rows_is_finite_and_right(backend, kind, value):
    op, reference_op, *_ = plain_and_residual(kind)
    x = torch.full((3, 33), value, dtype=torch.float64, device=DEVICE)
    with kernels.force(backend):
        leaf = x.float().requires_grad_()
        out = op(leaf, *(w.float() for w in parameters(kind, 33)))
        out.sum().backward()
    assert leaf.grad.isfinite().all()
    kernel_compare.assert_close(out, reference_op(x.float().double(), *parameters(kind, 33)), torch.float32)


@backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_of_huge_values_equal_reference(backend, kind, dtype):
    op, reference_op, add_op, add_reference = plain_and_residual(kind)
    x = normal(3, 96) * 1e4
    assert_matches_reference(backend, op, reference_op, (x, *parameters(kind, 96)), dtype)
    assert_matches_reference(backend, add_op, add_reference, (x, -x / 2, *parameters(kind, 96)), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_with_every_tile_candidate_equal_reference(kind):
    width, name = (96, kind.split()[0]) if DEVICE == "cpu" else (4096, kind.split()[0])
    _, _, op, reference_op = plain_and_residual(kind, dropout=kernels.Dropout(0.2, 9))
    inputs = normal(35, width), normal(35, width, seed=1), *parameters(kind, width)
    for forward, backward in itertools.zip_longest(
        rows.forward_tiles(width), rows.backward_tiles(torch.empty(1, width))
    ):
        with tuning.force_tiles(
            **{f"{name}_forward": forward or rows.forward_tiles(width)[0], f"{name}_backward": backward}
        ):
            assert_matches_reference("triton", op, reference_op, inputs, torch.float32)


def test_row_tiles_hold_whole_rows_up_to_max_width():
    for width in (1, 16, 17, 768, 4096, 16384, rows.MAX_WIDTH):
        for tiles in rows.forward_tiles(width) + rows.backward_tiles(torch.empty(1, width)):
            assert tiles["BLOCK_D"] >= width
            assert tiles["num_warps"] in (4, 8, 16, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_wider_than_max_width_equal_reference(kind):
    width = rows.MAX_WIDTH + 1
    op, reference_op, add_op, add_reference = plain_and_residual(kind, dropout=kernels.Dropout(0.2, 9))
    assert_matches_reference("triton", op, reference_op, (normal(2, width), *parameters(kind, width)), torch.float32)
    assert_matches_reference(
        "triton",
        add_op,
        add_reference,
        (normal(2, width), normal(2, width, seed=1), *parameters(kind, width)),
        torch.float32,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_norm_gradients_pass_gradcheck(kind):
    _, _, op, _ = plain_and_residual(kind, dropout=kernels.Dropout(0.2, 9))
    inputs = [t.requires_grad_() for t in (normal(3, 5), normal(3, 5, seed=1), *parameters(kind, 5))]
    with kernels.force("triton"):
        assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_rerun_or_checkpointed_are_bit_identical(kind):
    _, _, op, _ = plain_and_residual(kind, dropout=kernels.Dropout(0.2, 9))
    inputs = [t.float().requires_grad_() for t in (normal(150, 33), normal(150, 33, seed=1), *parameters(kind, 33))]
    runs = []
    with kernels.force("triton"):
        for run in (op, op, lambda *x: checkpoint(op, *x, use_reentrant=False)):
            outputs = run(*inputs)
            runs.append((*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), inputs)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_norms_compiled_equal_eager(kind):
    _, _, op, _ = plain_and_residual(kind, dropout=kernels.Dropout(0.2, 9))
    inputs = [t.float().requires_grad_() for t in (normal(3, 24), normal(3, 24, seed=1), *parameters(kind, 24))]

    def loss(*x):
        return sum(out.sin().sum() for out in op(*x))

    with kernels.force("triton"):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        pairs = zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_norm_ops_pass_opcheck():
    x, r, weight, bias = (normal(*shape, seed=n).float() for n, shape in enumerate([(3, 24), (3, 24), (24,), (24,)]))
    stats, dtypes = torch.ones(3, device=DEVICE), (torch.float32, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, r, weight, bias)]
    torch.library.opcheck(rms_norm_forward, (*leaves[:3], 1e-5, 0.2, 7))
    torch.library.opcheck(layer_norm_forward, (leaves[0], None, *leaves[2:], 1e-5, 0.0, 0))
    torch.library.opcheck(rms_norm_backward, (x, r, r, weight, stats, *dtypes, 0.2, 7))
    torch.library.opcheck(layer_norm_backward, (x, None, r, weight, None, stats, stats, *dtypes, 0.0, 0))
