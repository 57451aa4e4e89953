"""Philox in torch equals Triton's bit for bit, and its masks have the statistics that dropout needs."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import kernel_compare
from helpers.kernel_compare import DEVICE

import kernels
from kernels import philox, reference
from kernels.triton_ops.dropout import dropout_op
from kernels.triton_ops.rows import dropout_mask


def dropout_params(p, seed=2**40 + 5):
    return philox.Dropout(p, seed)


@triton.jit
def _randint4x_kernel(out_ptr, counter_ptr, seed, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    counters = tl.load(counter_ptr + index, mask=index < n)
    a, b, c, d = tl.randint4x(seed, counters)
    tl.store(out_ptr + index * 4, a.to(tl.int64), mask=index < n)
    tl.store(out_ptr + index * 4 + 1, b.to(tl.int64), mask=index < n)
    tl.store(out_ptr + index * 4 + 2, c.to(tl.int64), mask=index < n)
    tl.store(out_ptr + index * 4 + 3, d.to(tl.int64), mask=index < n)


@triton.jit
def _dropout_mask_kernel(
    out_ptr, seed, n_rows, width, THRESHOLD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row, column = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_D)[None, :]
    kept = dropout_mask(seed, row, width, THRESHOLD, BLOCK_R, BLOCK_D)
    tl.store(out_ptr + row * width + column, kept, mask=(row < n_rows) & (column < width))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**32, 2**63 - 1])
def test_philox_uint32_equals_triton(seed):
    counters = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62], device=DEVICE)
    in_torch = philox.philox_uint32(seed, counters)
    in_triton = torch.empty_like(in_torch)
    _randint4x_kernel[(1,)](in_triton, counters, seed, len(counters), BLOCK=16)
    assert torch.equal(in_torch, in_triton & philox.UINT32_MAX)


def test_philox_uint32_equals_random123_known_answer():
    """The answer is that of Random123's kat_vectors for philox4x32 with 10 rounds, counter 0 and key 0."""
    assert philox.philox_uint32(0, torch.tensor([0]))[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 768)])
def test_dropout_mask_in_triton_equals_torch(shape):
    rows, width = shape
    in_torch = philox.dropout_mask(torch.Size(shape), dropout_params(0.3), torch.device(DEVICE))
    in_kernel = torch.empty_like(in_torch)
    blocks = triton.next_power_of_2(rows), max(16, triton.next_power_of_2(width))
    _dropout_mask_kernel[(1,)](in_kernel, 2**40 + 5, rows, width, philox.keep_threshold(0.3), *blocks)
    assert torch.equal(in_torch, in_kernel)


def test_dropout_zeroes_its_share_evenly_and_reuses_its_mask():
    x = torch.ones(300, 1001, device=DEVICE, requires_grad=True)
    y = philox.dropout(x, dropout_params(0.1))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, grad), "the backward pass has another mask"
    assert abs((y == 0).double().mean().item() - 0.1) < 5 * (0.1 * 0.9 / y.numel()) ** 0.5
    assert y.unique().tolist() == [0, pytest.approx(1 / 0.9)]
    columns, rows = (y == 0).double().mean(0), (y == 0).double().mean(1)
    assert columns.max() < 0.2 > rows.max(), "zeros gather in a column or a row"
    assert not torch.equal(y, philox.dropout(x, dropout_params(0.1, seed=6)))


@kernel_compare.backends
@pytest.mark.parametrize("layout", ["plain", "strided"])
@pytest.mark.parametrize("dtype", list(kernel_compare.TOLERANCE))
def test_dropout_equals_reference(backend, layout, dtype):
    for shape in ((0, 5), (3, 2, 1), (3, 5, 97)):
        x = kernel_compare.normal(*shape)
        kernel_compare.assert_matches_reference(
            backend,
            lambda x: kernels.dropout(x, dropout_params(0.3)),
            lambda x: reference.dropout(x, dropout_params(0.3)),
            (x,),
            dtype,
            layout,
        )


def test_dropout_op_passes_opcheck():
    torch.library.opcheck(dropout_op, (kernel_compare.normal(3, 5).requires_grad_(), 0.3, 7))


@pytest.mark.parametrize(("p", "factor"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_at_p_0_keeps_all_and_at_p_1_nothing(p, factor):
    x = torch.full((7, 3), 2.0, device=DEVICE)
    assert torch.equal(philox.dropout(x, dropout_params(p)), factor * x)


def test_dropout_mask_in_chunks_equals_whole(monkeypatch):
    shape = torch.Size((9, 30))
    whole = philox.dropout_mask(shape, dropout_params(0.5), torch.device(DEVICE))
    monkeypatch.setattr("kernels.philox.COUNTERS_PER_CHUNK", 7)
    assert torch.equal(whole, philox.dropout_mask(shape, dropout_params(0.5), torch.device(DEVICE)))
