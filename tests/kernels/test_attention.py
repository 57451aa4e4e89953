"""Attention against the float64 reference: what a query may see, every gradient, and that hidden tiles are never touched."""

import functools

import pytest
import torch
from helpers import kernel_compare
from helpers.kernel_compare import DEVICE, agree, backends, normal
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import reference, tuning
from kernels.triton_ops.attention import backward_kv, backward_q, forward

LAUNCH = {"num_warps": 4, "num_stages": 2}
KERNELS = ("attention_forward", "attention_backward_q", "attention_backward_kv")
SMALL = {name: {"BLOCK_M": 32, "BLOCK_N": 32, "USE_TMA": 0, **LAUNCH} for name in KERNELS}
SMALL["attention_backward_bias"] = {"BLOCK_M": 32, "BLOCK_N": 32, **LAUNCH}
"""Tiles by which a short row has many, seen whole, in part and not at all."""


def tensors(rows, queries, keys, kv_heads, groups, head_dim):
    shape = (rows, queries, kv_heads * groups, head_dim), *[(rows, keys, kv_heads, head_dim)] * 2
    return tuple(normal(*s, seed=seed) for seed, s in enumerate(shape))


def ids(kind, rows, length):
    """Segment ids (B, T): "runs" of documents of uneven length and padding, documents of one "token", or at "random"."""
    draw = torch.Generator().manual_seed(length)
    if kind == "random":
        return torch.randint(0, 3, (rows, length), generator=draw).to(DEVICE)
    if kind == "token":
        return torch.arange(1, length + 1, device=DEVICE).expand(rows, -1)
    starts = torch.rand(rows, length, generator=draw) < 3 / length
    documents = 1 + starts.cumsum(1)
    documents[:, length - length // 8 :] = 0
    return documents.to(DEVICE)


def compare(backend, inputs, dtype=torch.float32, layout="plain", **options):
    """The public op and the reference agree on q, k, v and perhaps a bias."""

    def on(op, q, k, v, *bias):
        return op(q, k, v, **options, **({"bias": bias[0]} if bias else {}))

    agree(
        backend,
        functools.partial(on, kernels.attention),
        functools.partial(on, reference.attention),
        inputs,
        dtype,
        layout,
    )


@backends
@examples(max_examples=14, deadline=None, derandomize=True)
@given(
    dtype=kernel_compare.dtypes,
    layout=kernel_compare.layouts,
    rows=st.sampled_from([1, 1, 2]),
    queries=st.sampled_from([1, 31, 49]),
    more=st.sampled_from([0, 0, 0, 30, -20]),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    head_dim=st.sampled_from([2, 16, 20]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 20]),
    documents=st.sampled_from([None, "runs", "token", "random"]),
    bias=st.sampled_from([None, None, (False, False), (True, False), (False, True), (True, True)]),
    rope=st.booleans(),
)
def test_attention(backend, dtype, layout, rows, queries, more, heads, head_dim, causal, window, documents, bias, rope):
    keys = max(1, queries + more)
    inputs = tensors(rows, queries, keys, *heads, head_dim)
    if bias is not None:
        inputs += (normal(rows if bias[0] else 1, heads[0] * heads[1] if bias[1] else 1, queries, keys, seed=3),)
    options = {"causal": causal, "window": window}
    if documents is not None:
        packed = ids(documents, rows, max(queries, keys))
        options["segments"] = kernels.Segments(packed[:, -queries:], packed[:, -keys:])
    if rope and queries == keys:
        options["rope"] = kernels.rope_table(torch.arange(queries, device=DEVICE)[None], head_dim, 100.0)
    with tuning.force_tiles(**SMALL):
        compare(backend, inputs, dtype, layout, **options)


@pytest.mark.parametrize("head_dim", [16, 24])
def test_tiles_that_the_copy_engine_fetches(head_dim):
    """The same by tensor descriptors, up to places and columns that lie outside of the tensor."""
    packed = ids("runs", 2, 49)
    rope = kernels.rope_table(torch.arange(49, device=DEVICE)[None], head_dim, 100.0) if head_dim == 16 else None
    with tuning.force_tiles(**{name: SMALL[name] | {"USE_TMA": 1} for name in KERNELS}):
        inputs = tensors(2, 49, 49, 1, 2, head_dim)
        compare("triton", inputs, causal=True, segments=kernels.Segments(packed, packed), rope=rope)


@backends
@pytest.mark.parametrize("head_dim", [1, 20, 80, 96, 128, 160, 256])
def test_every_width_of_head(backend, head_dim):
    rope = None if head_dim % 2 else kernels.rope_table(torch.arange(40, device=DEVICE)[None], head_dim, 100.0)
    compare(backend, tensors(1, 40, 40, 1, 1, head_dim), causal=True, rope=rope)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_tile_that_the_tuner_may_pick(monkeypatch, head_dim, dtype):
    length = 4097 if DEVICE == "cuda" else 140
    packed = ids("runs", 2, length)
    rope = kernels.rope_table(torch.arange(length, device=DEVICE)[None], head_dim, 1e4)
    options = {"causal": True, "segments": kernels.Segments(packed, packed)}
    for number in range(5):
        monkeypatch.setattr(
            tuning, "best_tiles", lambda op, shapes, candidates, run, n=number: candidates[n % len(candidates)]
        )
        compare(
            "triton", tensors(2, length, length, 1, 2, head_dim), dtype, **options, rope=rope if number % 2 else None
        )


def test_wider_heads_are_torchs_where_the_choice_is_free_and_an_error_where_triton_was_asked_for():
    q, k, v = tensors(1, 5, 5, 1, 1, 257)
    with kernels.force("triton"), pytest.raises(ValueError, match="heads 257 wide, only 256"):
        kernels.attention(q, k, v, causal=True)
    compare("auto", (q, k, v), causal=True)


@backends
@pytest.mark.parametrize("queries", [1, 3])
def test_a_few_queries_over_many_keys(backend, queries):
    """Decoding: the keys are split, and of a padded batch each row sees as many as it holds."""
    q, k, v = tensors(2, queries, 300, 1, 4, 16)
    held = torch.tensor([[300], [100]], device=DEVICE)
    seen = (torch.arange(300, device=DEVICE) < held).long()
    options = {"causal": queries > 1, "segments": kernels.Segments(torch.ones_like(seen[:, :queries]), seen)}
    with tuning.force_tiles(attention_forward={"BLOCK_M": 16, "BLOCK_N": 32, "USE_TMA": 0, **LAUNCH}):
        compare(backend, (q, k, v), **options)


@backends
def test_the_last_query_stands_at_the_last_key(backend):
    q, k, v = tensors(1, 40, 40, 2, 1, 16)
    with kernels.force(backend):
        whole = kernels.attention(q, k, v, causal=True)
        assert torch.allclose(whole[:, -7:], kernels.attention(q[:, -7:], k, v, causal=True))


@backends
def test_a_query_that_sees_no_key_gives_zero_and_takes_no_part(backend):
    q, k, v = (x.requires_grad_() for x in tensors(1, 40, 9, 1, 2, 16))
    strangers = kernels.Segments(
        torch.tensor([[1] * 30 + [2] * 10], device=DEVICE), torch.tensor([[2] * 9], device=DEVICE)
    )
    hidden = torch.zeros(1, 1, 40, 9, dtype=torch.float64, device=DEVICE)
    hidden[:, :, :30] = -torch.inf
    for first, options in ((31, {"causal": True}), (30, {"segments": strangers}), (30, {"bias": hidden})):
        with kernels.force(backend), tuning.force_tiles(**SMALL):
            out = kernels.attention(q, k, v, **{"causal": False} | options)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert out[:, :first].count_nonzero() == 0
        assert out[:, first:].count_nonzero() == out[:, first:].numel()
        assert grads[0][:, :first].count_nonzero() == 0
        assert all(g.isfinite().all() for g in grads)
        compare(backend, (q, k, v), **{"causal": False} | options)


@backends
def test_no_tokens_at_all(backend):
    for queries, keys in ((0, 4), (4, 0), (0, 0)):
        q, k, v = (x.requires_grad_() for x in tensors(2, queries, keys, 1, 2, 8))
        with kernels.force(backend):
            out = kernels.attention(q, k, v, causal=False)
        out.sum().backward()
        assert out.shape == q.shape
        assert all(x.grad.count_nonzero() == 0 for x in (q, k, v))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores(backend, dtype):
    """Scores of 1e4 pick one key each: its value exactly, and its gradient, with nothing left for queries and keys."""
    one_hot = 100 * torch.eye(40, 64, dtype=dtype, device=DEVICE)[None, :, None]
    v = normal(1, 40, 1, 64).to(dtype).requires_grad_()
    for sign in (1, -1):
        q, k = (x.requires_grad_() for x in (sign * one_hot, one_hot.clone()))
        with kernels.force(backend), tuning.force_tiles(**SMALL):
            out = kernels.attention(q, k, v, causal=sign == 1, scale=float(sign))
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert torch.equal(out, v)
        assert torch.equal(grads[2], torch.ones_like(v))
        assert all(g.abs().max() < 0.01 for g in grads[:2])


@backends
def test_gradients_by_differences(backend):
    q, k, v = (x.requires_grad_() for x in tensors(1, 5, 5, 1, 2, 4))
    bias = normal(1, 2, 5, 5, seed=3).requires_grad_()
    rope = kernels.rope_table(torch.arange(5, device=DEVICE)[None], 4, 100.0)
    with kernels.force(backend):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b: kernels.attention(q, k, v, causal=True, bias=b, rope=rope),
            (q, k, v, bias),
            fast_mode=True,
        )


@backends
def test_parts_of_one_projection_are_taken_as_they_are(backend):
    qkv = normal(2, 40, 6, 16).requires_grad_()
    with kernels.force(backend):
        out = kernels.attention(*qkv.split((4, 1, 1), dim=2), causal=True)
        [grad] = torch.autograd.grad(out.square().sum(), qkv)
        out_again = kernels.attention(*(x.contiguous() for x in qkv.split((4, 1, 1), dim=2)), causal=True)
        [again] = torch.autograd.grad(out_again.square().sum(), qkv)
    assert torch.equal(out, out_again)
    assert torch.equal(grad, again)


@backends
def test_a_document_of_a_pack_attends_as_if_alone(backend):
    q, k, v = tensors(1, 91, 91, 1, 2, 16)
    lengths = [40, 1, 33, 17]
    packed = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor(lengths))[None].to(DEVICE)
    with kernels.force(backend), tuning.force_tiles(**SMALL):
        together = kernels.attention(q, k, v, causal=True, segments=kernels.Segments(packed, packed))
        for part in zip(*(x.split(lengths, dim=1) for x in (q, k, v, together)), strict=True):
            assert torch.allclose(kernels.attention(*part[:3], causal=True), part[3])


DOCUMENTS = torch.repeat_interleave(torch.arange(1, 4), torch.tensor([64, 96, 64]))[None].to(DEVICE)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_other_documents_are_not_read(causal):
    """Whatever stands in the whole blocks of other documents, NaN say, neither an output nor a gradient knows of it."""
    segments = kernels.Segments(DOCUMENTS, DOCUMENTS)
    for number in (1, 2):
        own = (DOCUMENTS[0] == number).nonzero()[:, 0]
        full = tensors(1, 224, 224, 1, 1, 16)
        spoilt = [torch.full_like(x, torch.nan).index_copy(1, own, x[:, own]).requires_grad_() for x in full]
        alone = [x[:, own].requires_grad_() for x in full]
        with kernels.force("triton"), tuning.force_tiles(**SMALL):
            out = kernels.attention(*spoilt, causal=causal, segments=segments)[:, own]
            right = kernels.attention(*alone, causal=causal)
            grads = torch.autograd.grad(out.sum(), spoilt)
            wanted = torch.autograd.grad(right.sum(), alone)
        assert torch.allclose(out, right)
        assert all(torch.allclose(g[:, own], w) for g, w in zip(grads, wanted, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the products that the interpreter makes")
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 32), (False, 33)])
def test_as_many_tiles_are_computed_as_hold_a_visible_pair(monkeypatch, causal, window):
    segments = kernels.Segments(DOCUMENTS, DOCUMENTS)
    visible = segments.visible(causal, window)[0].unflatten(0, (7, 32)).unflatten(2, (7, 32)).any((1, 3)).sum().item()
    products = []

    def counting(*args):
        products.append(1)
        return kernels.launch.dot(*args)

    for module in (forward, backward_q, backward_kv):
        monkeypatch.setattr(module, "dot", counting)
    q, k, v = (x.requires_grad_() for x in tensors(1, 224, 224, 1, 1, 16))
    with kernels.force("triton"), tuning.force_tiles(**SMALL):
        out = kernels.attention(q, k, v, causal=causal, window=window, segments=segments)
        assert len(products) == 2 * visible
        out.sum().backward()
    assert len(products) == (2 + 3 + 4) * visible


def test_marks_are_the_intervals_that_ids_leave():
    for kind in ("runs", "token", "random"):
        q, kv = ids(kind, 2, 23), ids(kind, 2, 31)
        for marks, mine, others in zip(kernels.Segments(q, kv).bounds(), (q, kv), (kv, q), strict=True):
            for row, places in enumerate(mine.tolist()):
                for place, own in enumerate(places):
                    same = (others[row] == own).nonzero()[:, 0].tolist()
                    start, stop = (same[0], same[-1] + 1) if same else (others.shape[1], 0)
                    whole = stop if stop - start == len(same) else 0
                    assert marks[row, :, place].tolist() == [own, start, stop, whole]


def test_what_is_derived_of_segments_is_made_once():
    segments = kernels.Segments(*[torch.tensor([[1, 1, 2]])] * 2)
    assert segments.mask(True, None, torch.float32) is segments.mask(True, None, torch.float32)
    assert segments.mask(True, None, torch.bfloat16).dtype == torch.bfloat16
    assert segments.bounds() is segments.bounds()
    assert segments.repeat_queries(2) is segments.repeat_queries(2)
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(2, 3\)"):
        kernels.Segments(segments.q, segments.kv.expand(2, -1))


def test_the_registered_ops_keep_torchs_rules():
    q, k, v = (x.requires_grad_() for x in tensors(1, 3, 3, 1, 1, 4))
    marks = kernels.Segments(*[torch.ones(1, 3, dtype=torch.long, device=DEVICE)] * 2).bounds()
    bias = normal(1, 1, 3, 3).requires_grad_()
    table = [x.contiguous() for x in kernels.rope_table(torch.arange(3, device=DEVICE)[None], 4, 100.0)]
    arguments = q, k, v, bias, *marks, *table, 9, 0, 0.5
    torch.library.opcheck(torch.ops.trireme.attention_forward.default, arguments)
    out, lse = torch.ops.trireme.attention_forward(*arguments)
    taken = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*arguments, out, lse, out)]
    torch.library.opcheck(torch.ops.trireme.attention_backward.default, (*taken, True))


@backends
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_through_torchs_transformations(backend, how):
    packed = ids("runs", 1, 40)
    inputs = [x.requires_grad_() for x in tensors(1, 40, 40, 1, 2, 16)]

    def layer(q, k, v):
        return kernels.attention(q * 1.5, k, v, causal=True, segments=kernels.Segments(packed, packed))

    with kernels.force(backend):
        plain = layer(*inputs)
        if how == "compiled":
            out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
        else:
            out = checkpoint(layer, *inputs, use_reentrant=False)
        pairs = zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (plain, out)), strict=True)
    assert torch.allclose(plain, out)
    assert all(torch.allclose(a, b) for a, b in pairs)


@backends
def test_under_autocast_all_are_multiplied_in_its_format(backend):
    q, k, v = (x.float().requires_grad_() for x in tensors(1, 5, 5, 1, 1, 8))
    with kernels.force(backend), torch.autocast(DEVICE, torch.bfloat16):
        out = kernels.attention(q.bfloat16(), k, v, causal=True)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad.dtype == torch.float32
