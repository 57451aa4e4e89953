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


@quick
@given(
    dtype=dtypes,
    rows=st.integers(1, 5),
    width=st.sampled_from([1, 3, 17, 96, 768]),
    bias=st.booleans(),
    add=st.booleans(),
)
def test_layer_norm(dtype, rows, width, bias, add):
    x, residual, weight = normal(rows, 2, width) * 3 + 1, normal(rows, 2, width, seed=1), normal(width, seed=2)
    eps = 1e-5 if width > 1 else 1.0  # the gradient of a row of one is 0: only rounding would be compared
    shift = (normal(width, seed=3),) if bias else ()

    def right(x, weight, *shift):
        return reference.layer_norm(x, weight, shift[0] if shift else None, eps)

    def plain(x, weight, *shift):
        return kernels.layer_norm(x, weight, shift[0] if shift else None, eps)

    def fused(x, residual, weight, *shift):
        return kernels.add_layer_norm(x, residual, weight, shift[0] if shift else None, eps)[0]

    if add:
        agree(fused, lambda x, r, w, *s: right(x + r, w, *s), (x, residual, weight, *shift), dtype)
    else:
        agree(plain, right, (x, weight, *shift), dtype)


@quick
@given(dtype=dtypes, rows=st.integers(1, 5), width=st.sampled_from([1, 3, 17, 96, 768]))
def test_rms_norm(dtype, rows, width):
    x, residual, weight = normal(rows, 2, width) * 3 + 1, normal(rows, 2, width, seed=1), normal(width, seed=2)
    agree(lambda x, w: kernels.rms_norm(x, w, 1e-2), lambda x, w: reference.rms_norm(x, w, 1e-2), (x, weight), dtype)
    agree(
        lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-2),
        lambda x, r, w: (reference.rms_norm(x + r, w, 1e-2), x + r),
        (x, residual, weight),
        dtype,
    )


@quick
@given(dtype=dtypes, tokens=st.sampled_from([1, 5, 33]), heads=st.integers(1, 3), half=st.sampled_from([1, 4, 48]))
def test_rope(dtype, tokens, heads, half):
    positions = torch.randint(0, 300, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    table = kernels.rope_table(positions, 2 * half, 10000.0)

    def plain(x):
        # in float64 the table is the float32 one of a real run, good to 300 * 2^-24
        return kernels.rope(x, table)

    x = normal(2, tokens, heads, 2 * half)
    if dtype == torch.float64:
        assert torch.allclose(plain(x), reference.rope(x, positions, 10000.0), atol=1e-4)
    else:
        wider = {torch.float32: 1e-4}.get(dtype, TOLERANCE[dtype])
        assert (plain(x.to(dtype)).double() - reference.rope(x.to(dtype).double(), positions, 10000.0)).abs().max() < 4 * wider


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = normal(1, 1, 1, 8).expand(1, 9, 1, 8), normal(1, 1, 1, 8, seed=1).expand(1, 9, 1, 8)
    scores = []
    for start in (0, 50):
        table = kernels.rope_table(start + torch.arange(9)[None], 8, 10000.0)
        scores.append(torch.einsum("bqhd,bkhd->qk", kernels.rope(q, table), kernels.rope(k, table)))
    assert torch.allclose(*scores, atol=1e-4)
    assert torch.allclose(scores[0].diagonal(1), scores[0].diagonal(1)[0], atol=1e-4)


@quick
@given(dtype=dtypes, size=st.sampled_from([1, 7, 64, 1000]))
def test_activations(dtype, size):
    gate, up = normal(2, size) * 3, normal(2, size, seed=1)
    agree(kernels.gelu, reference.gelu, (gate,), dtype)
    agree(kernels.gated_mlp, reference.gated_mlp, (gate, up), dtype)


def test_importing_the_ops_loads_no_driver():
    code = "import sys, kernels; assert 'triton' not in sys.modules; import torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
