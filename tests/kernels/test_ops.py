"""The public ops against the reference in float64: values, every gradient, odd shapes, a tolerance by dtype."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
dtypes = st.sampled_from(list(TOLERANCE))
quick = settings(max_examples=25, deadline=None, derandomize=True)


def agree(op, expected, inputs, dtype):
    """The op on ``dtype`` inputs equals the reference on the same numbers in float64, and so do all gradients."""
    inputs = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().clone().requires_grad_() for x in inputs]
    before = [x.detach().clone() for x in inputs]
    out, want = op(*inputs), expected(*exact)
    outs, wants = (y if isinstance(y, tuple) else (y,) for y in (out, want))
    weights = [torch.linspace(-1, 1, w.numel(), dtype=torch.float64).view(w.shape) for w in wants]
    sum((o.double() * w).sum() for o, w in zip(outs, weights, strict=True)).backward()
    sum((o * w).sum() for o, w in zip(wants, weights, strict=True)).backward()
    for got, right in [*zip(outs, wants, strict=True), *((x.grad, e.grad) for x, e in zip(inputs, exact, strict=True))]:
        scale = right.detach().abs().max().clamp(min=0.1)
        assert ((got.double() - right).abs().max() / scale).item() <= TOLERANCE[dtype]
    assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True)), "an op changed its input"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(
    dtype=dtypes,
    rows=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 7, 13, 33]),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([1, 8, 20, 96]),
    causal=st.booleans(),
    documents=st.sampled_from([0, 1, 4]),
)
def test_attention(dtype, rows, tokens, kv_heads, groups, head_dim, causal, documents):
    q = normal(rows, tokens, kv_heads * groups, head_dim)
    k, v = normal(rows, tokens, kv_heads, head_dim, seed=1), normal(rows, tokens, kv_heads, head_dim, seed=2)
    segments = None
    if documents:
        ids = torch.randint(0, documents + 1, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        segments = kernels.Segments(ids, ids)
    ops = (lambda q, k, v, op=op: op(q, k, v, causal=causal, segments=segments) for op in (kernels.attention, reference.attention))
    agree(*ops, (q, k, v), dtype)


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (3, 9), (9, 3), (5, 5)])
def test_causal_attention_puts_the_last_query_at_the_last_key(queries, keys):
    q, k, v = normal(2, queries, 2, 8), normal(2, keys, 2, 8, seed=1), normal(2, keys, 2, 8, seed=2)
    if queries <= keys:
        agree(
            *(lambda *x, op=op: op(*x, causal=True) for op in (kernels.attention, reference.attention)),
            (q, k, v),
            torch.float32,
        )
    whole = kernels.attention(normal(2, keys, 2, 8), k, v, causal=True)
    last = kernels.attention(normal(2, keys, 2, 8)[:, -1:], k, v, causal=True)
    assert torch.allclose(whole[:, -1:], last)


def test_attention_takes_views_and_a_scale_of_its_own():
    qkv = normal(2, 5, 12, 8)
    for op in (kernels.attention, reference.attention):
        scaled = op(qkv[:, :, :4], qkv[:, :, 4:8], qkv[:, :, 8:], causal=True, scale=0.3)
        copied = op(*(x.contiguous() for x in qkv.split(4, 2)), causal=True, scale=0.3)
        assert torch.allclose(scaled, copied)
        assert not torch.allclose(scaled, op(*qkv.split(4, 2), causal=True))


def test_a_document_of_a_pack_attends_as_if_alone():
    q, k, v = (normal(1, 11, 2, 8, seed=seed) for seed in range(3))
    ids = torch.tensor([[1] * 4 + [2] * 1 + [3] * 3 + [0] * 3])
    packed = kernels.attention(q, k, v, causal=True, segments=kernels.Segments(ids, ids))
    for part in (slice(0, 4), slice(4, 5), slice(5, 8)):
        assert torch.allclose(packed[:, part], kernels.attention(q[:, part], k[:, part], v[:, part], causal=True))
    assert packed.isfinite().all()


def test_the_mask_of_a_batch_is_made_once():
    ids = torch.tensor([[1, 1, 2]])
    segments = kernels.Segments(ids, ids)
    assert segments.mask(True, torch.float32) is segments.mask(True, torch.float32)
    assert segments.mask(True, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(2, 3\)"):
        kernels.Segments(ids, ids.expand(2, -1))


def test_importing_the_ops_loads_no_driver():
    code = "import sys, kernels; assert 'triton' not in sys.modules; import torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
