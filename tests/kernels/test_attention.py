"""Attention against the float64 reference; and hidden tiles are never read."""

import functools

import pytest
import torch
from helpers import kernel_compare
from helpers.kernel_compare import DEVICE, assert_matches_reference, backends, normal
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import reference, requirements, tuning
from kernels.triton_ops.attention import backward_kv, backward_q, forward

LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 2}
KERNELS = ("attention_forward", "attention_backward_q", "attention_backward_kv")
SMALL_TILES = {name: {"BLOCK_M": 32, "BLOCK_N": 32, "USE_TMA": 0, **LAUNCH_OPTIONS} for name in KERNELS}
SMALL_TILES["attention_backward_bias"] = {"BLOCK_M": 32, "BLOCK_N": 32, **LAUNCH_OPTIONS}
"""Tiles so small that a short row has many of them: full, partial and hidden ones."""


def qkv(batch_size, n_queries, n_keys, kv_heads, groups, head_dim):
    shape = (batch_size, n_queries, kv_heads * groups, head_dim), *[(batch_size, n_keys, kv_heads, head_dim)] * 2
    return tuple(normal(*s, seed=seed) for seed, s in enumerate(shape))


def segment_ids(kind, batch_size, length):
    """Segment ids (B, T): "runs" of uneven documents and padding, one document per "token", or "random" ids."""
    draw = torch.Generator().manual_seed(length)
    if kind == "random":
        return torch.randint(0, 3, (batch_size, length), generator=draw).to(DEVICE)
    if kind == "token":
        return torch.arange(1, length + 1, device=DEVICE).expand(batch_size, -1)
    starts = torch.rand(batch_size, length, generator=draw) < 3 / length
    documents = 1 + starts.cumsum(1)
    documents[:, length - length // 8 :] = 0
    return documents.to(DEVICE)


def assert_attention_matches(backend, inputs, dtype=torch.float32, layout="plain", **options):
    """The public op equals the reference on inputs (q, k, v) or (q, k, v, bias)."""

    def on(op, q, k, v, *bias):
        return op(q, k, v, **options, **({"bias": bias[0]} if bias else {}))

    assert_matches_reference(
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
    batch_size=st.sampled_from([1, 1, 2]),
    n_queries=st.sampled_from([1, 31, 49]),
    extra_keys=st.sampled_from([0, 0, 0, 30, -20]),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    head_dim=st.sampled_from([2, 16, 20]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 20]),
    documents=st.sampled_from([None, "runs", "token", "random"]),
    bias=st.sampled_from([None, None, (False, False), (True, False), (False, True), (True, True)]),
    rope=st.booleans(),
)
def test_attention_equals_float64_reference(
    backend, dtype, layout, batch_size, n_queries, extra_keys, heads, head_dim, causal, window, documents, bias, rope
):
    n_keys = max(1, n_queries + extra_keys)
    inputs = qkv(batch_size, n_queries, n_keys, *heads, head_dim)
    if bias is not None:
        bias_shape = batch_size if bias[0] else 1, heads[0] * heads[1] if bias[1] else 1, n_queries, n_keys
        inputs += (normal(*bias_shape, seed=3),)
    options = {"causal": causal, "window": window}
    if documents is not None:
        ids = segment_ids(documents, batch_size, max(n_queries, n_keys))
        options["segments"] = kernels.Segments(ids[:, -n_queries:], ids[:, -n_keys:])
    if rope and n_queries == n_keys:
        options["rope"] = kernels.rope_table(torch.arange(n_queries, device=DEVICE)[None], head_dim, 100.0)
    with tuning.force_tiles(**SMALL_TILES):
        assert_attention_matches(backend, inputs, dtype, layout, **options)


@pytest.mark.parametrize("head_dim", [16, 24])
def test_attention_by_tma_descriptors_equals_reference(head_dim):
    """Tiles read by tensor descriptors may reach positions and columns outside of the tensor."""
    ids = segment_ids("runs", 2, 49)
    rope = kernels.rope_table(torch.arange(49, device=DEVICE)[None], head_dim, 100.0) if head_dim == 16 else None
    with tuning.force_tiles(**{name: SMALL_TILES[name] | {"USE_TMA": 1} for name in KERNELS}):
        inputs = qkv(2, 49, 49, 1, 2, head_dim)
        assert_attention_matches("triton", inputs, causal=True, segments=kernels.Segments(ids, ids), rope=rope)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton compiles it for some tiles of some GPUs only: see the next test")
def test_attention_with_specialized_warps_equals_reference():
    specialized = SMALL_TILES | {"attention_forward": SMALL_TILES["attention_forward"] | {"WARP_SPECIALIZE": 1}}
    with tuning.force_tiles(**specialized):
        assert_attention_matches("triton", qkv(1, 49, 49, 1, 1, 16), causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [None, "runs"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_by_every_candidate_of_this_gpu_equals_reference(head_dim, documents):
    """A candidate that is fast and wrong would be chosen by its time."""
    inputs = qkv(1, 300, 300, 1, 2, head_dim)
    ids = None if documents is None else segment_ids(documents, 1, 300)
    segments = None if ids is None else kernels.Segments(ids, ids)
    limits = requirements.limits_of(torch.device(DEVICE))
    for module, name in ((forward, KERNELS[0]), (backward_q, KERNELS[1]), (backward_kv, KERNELS[2])):
        for choice in module._tile_choices(inputs[0].to(torch.bfloat16)):
            if choice.fits(limits, 0):
                with tuning.force_tiles(**{name: choice.tiles()}):
                    assert_attention_matches("triton", inputs, torch.bfloat16, causal=True, segments=segments)


@backends
@pytest.mark.parametrize("head_dim", [1, 20, 80, 96, 128, 160, 256])
def test_attention_at_every_head_dim_equals_reference(backend, head_dim):
    rope = None if head_dim % 2 else kernels.rope_table(torch.arange(40, device=DEVICE)[None], head_dim, 100.0)
    assert_attention_matches(backend, qkv(1, 40, 40, 1, 1, head_dim), causal=True, rope=rope)


@pytest.mark.skipif(DEVICE != "cpu", reason="it is the CPU's attention of short rows")
def test_bf16_attention_on_a_cpu_errs_no_more_than_torchs_own():
    """Scores of some tens, which bf16 would round by a tenth."""
    inputs = [(x * scale).bfloat16() for x, scale in zip(qkv(2, 96, 96, 2, 1, 32), (3, 3, 1), strict=True)]
    heads_first = [x.transpose(1, 2) for x in inputs]
    exact = reference.attention(*(x.double() for x in inputs), causal=True)
    torchs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    ours = kernels.attention(*inputs, causal=True)
    assert (ours - exact).norm() < 1.5 * (torchs - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_attention_with_every_tile_candidate_equals_reference(monkeypatch, head_dim, dtype):
    length = 4097 if DEVICE == "cuda" else 140
    ids = segment_ids("runs", 2, length)
    rope = kernels.rope_table(torch.arange(length, device=DEVICE)[None], head_dim, 1e4)
    options = {"causal": True, "segments": kernels.Segments(ids, ids)}
    for number in range(5):

        def nth_candidate(op, shape_class, candidates, run, n=number):
            return candidates[n % len(candidates)]

        monkeypatch.setattr(tuning, "best_tiles", nth_candidate)
        inputs = qkv(2, length, length, 1, 2, head_dim)
        assert_attention_matches("triton", inputs, dtype, **options, rope=rope if number % 2 else None)


SMALL_GPU = requirements.DeviceLimits((8, 6), 99 << 10)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the tests of its own candidates say more")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [48, 128, 256])
def test_attention_with_the_candidates_of_a_small_gpu_equals_reference(monkeypatch, head_dim, dtype, bias):
    """The tiles that 99 KiB of shared memory leave, each of them, on rows that are no multiple of a tile."""
    inputs = qkv(1, 37, 37, 1, 2, head_dim)
    ids = segment_ids("runs", 1, 37)
    options = {"causal": not bias, "segments": kernels.Segments(ids, ids)}
    inputs += (normal(1, 2, 37, 37, seed=3),) if bias else ()
    most = []
    for number in range(3):

        def nth_candidate(op, shape_class, candidates, run, n=number):
            most.append(len(candidates))
            return candidates[n % len(candidates)]

        monkeypatch.setattr(tuning, "best_tiles", nth_candidate)
        if number < max(most, default=1):
            with requirements.assuming_limits(SMALL_GPU):
                assert_attention_matches("triton", inputs, dtype, **options)
    assert 1 <= min(most) <= max(most) <= 3


def test_attention_without_tiles_that_fit_names_the_cure():
    q, k, v = (x.requires_grad_() for x in qkv(1, 5, 5, 1, 1, 256))  # float64: its backward pass takes 161 KiB
    with kernels.force("triton"), requirements.assuming_limits(SMALL_GPU):
        out = kernels.attention(q, k, v, causal=True)
        with pytest.raises(ValueError, match="use kernels=torch"):
            out.sum().backward()


def test_attention_head_dim_over_256_runs_on_torch_or_raises():
    q, k, v = qkv(1, 5, 5, 1, 1, 257)
    with kernels.force("triton"), pytest.raises(ValueError, match="heads 257 wide, only 256"):
        kernels.attention(q, k, v, causal=True)
    assert_attention_matches("auto", (q, k, v), causal=True)


@backends
@pytest.mark.parametrize("n_queries", [1, 3])
def test_decoding_over_split_keys_equals_reference(backend, n_queries):
    """In decoding the keys are split over programs; each row of a padded batch sees only its own length."""
    q, k, v = qkv(2, n_queries, 300, 1, 4, 16)
    lengths = torch.tensor([[300], [100]], device=DEVICE)
    visible_keys = (torch.arange(300, device=DEVICE) < lengths).long()
    options = {
        "causal": n_queries > 1,
        "segments": kernels.Segments(torch.ones_like(visible_keys[:, :n_queries]), visible_keys),
    }
    with tuning.force_tiles(attention_forward={"BLOCK_M": 16, "BLOCK_N": 32, "USE_TMA": 0, **LAUNCH_OPTIONS}):
        assert_attention_matches(backend, (q, k, v), **options)


@backends
def test_causal_attention_aligns_last_query_with_last_key(backend):
    q, k, v = qkv(1, 40, 40, 2, 1, 16)
    with kernels.force(backend):
        whole = kernels.attention(q, k, v, causal=True)
        assert torch.allclose(whole[:, -7:], kernels.attention(q[:, -7:], k, v, causal=True))


@backends
def test_query_without_visible_key_gives_zero_and_zero_gradients(backend):
    q, k, v = (x.requires_grad_() for x in qkv(1, 40, 9, 1, 2, 16))
    other_segments = kernels.Segments(
        torch.tensor([[1] * 30 + [2] * 10], device=DEVICE), torch.tensor([[2] * 9], device=DEVICE)
    )
    hiding_bias = torch.zeros(1, 1, 40, 9, dtype=torch.float64, device=DEVICE)
    hiding_bias[:, :, :30] = -torch.inf
    for first, options in ((31, {"causal": True}), (30, {"segments": other_segments}), (30, {"bias": hiding_bias})):
        with kernels.force(backend), tuning.force_tiles(**SMALL_TILES):
            out = kernels.attention(q, k, v, **{"causal": False} | options)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert out[:, :first].count_nonzero() == 0
        assert out[:, first:].count_nonzero() == out[:, first:].numel()
        assert grads[0][:, :first].count_nonzero() == 0
        assert all(g.isfinite().all() for g in grads)
        assert_attention_matches(backend, (q, k, v), **{"causal": False} | options)


@backends
def test_attention_of_empty_sequences_is_zero(backend):
    for n_queries, n_keys in ((0, 4), (4, 0), (0, 0)):
        q, k, v = (x.requires_grad_() for x in qkv(2, n_queries, n_keys, 1, 2, 8))
        with kernels.force(backend):
            out = kernels.attention(q, k, v, causal=False)
        out.sum().backward()
        assert out.shape == q.shape
        assert all(x.grad.count_nonzero() == 0 for x in (q, k, v))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_extreme_scores_selects_one_value(backend, dtype):
    """Scores of 1e4 select exactly one value each, which gets the whole gradient; queries and keys get almost none."""
    one_hot = 100 * torch.eye(40, 64, dtype=dtype, device=DEVICE)[None, :, None]
    v = normal(1, 40, 1, 64).to(dtype).requires_grad_()
    for sign in (1, -1):
        q, k = (x.requires_grad_() for x in (sign * one_hot, one_hot.clone()))
        with kernels.force(backend), tuning.force_tiles(**SMALL_TILES):
            out = kernels.attention(q, k, v, causal=sign == 1, scale=float(sign))
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert torch.equal(out, v)
        assert torch.equal(grads[2], torch.ones_like(v))
        assert all(g.abs().max() < 0.01 for g in grads[:2])


@backends
def test_attention_gradients_pass_gradcheck(backend):
    q, k, v = (x.requires_grad_() for x in qkv(1, 5, 5, 1, 2, 4))
    bias = normal(1, 2, 5, 5, seed=3).requires_grad_()
    rope = kernels.rope_table(torch.arange(5, device=DEVICE)[None], 4, 100.0)
    with kernels.force(backend):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b: kernels.attention(q, k, v, causal=True, bias=b, rope=rope),
            (q, k, v, bias),
            fast_mode=True,
        )


@backends
def test_attention_of_qkv_views_equals_contiguous_copies(backend):
    qkv = normal(2, 40, 6, 16).requires_grad_()
    with kernels.force(backend):
        out = kernels.attention(*qkv.split((4, 1, 1), dim=2), causal=True)
        [grad] = torch.autograd.grad(out.square().sum(), qkv)
        out_again = kernels.attention(*(x.contiguous() for x in qkv.split((4, 1, 1), dim=2)), causal=True)
        [again] = torch.autograd.grad(out_again.square().sum(), qkv)
    assert torch.equal(out, out_again)
    assert torch.equal(grad, again)


@backends
def test_packed_document_attends_as_if_alone(backend):
    q, k, v = qkv(1, 91, 91, 1, 2, 16)
    lengths = [40, 1, 33, 17]
    ids = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor(lengths))[None].to(DEVICE)
    with kernels.force(backend), tuning.force_tiles(**SMALL_TILES):
        together = kernels.attention(q, k, v, causal=True, segments=kernels.Segments(ids, ids))
        for document in zip(*(x.split(lengths, dim=1) for x in (q, k, v, together)), strict=True):
            assert torch.allclose(kernels.attention(*document[:3], causal=True), document[3])


DOCUMENTS = torch.repeat_interleave(torch.arange(1, 4), torch.tensor([64, 96, 64]))[None].to(DEVICE)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_never_reads_tiles_of_other_documents(causal):
    """NaN in the blocks of other documents reaches neither an output nor a gradient."""
    segments = kernels.Segments(DOCUMENTS, DOCUMENTS)
    for number in (1, 2):
        own = (DOCUMENTS[0] == number).nonzero()[:, 0]
        full = qkv(1, 224, 224, 1, 1, 16)
        poisoned = [torch.full_like(x, torch.nan).index_copy(1, own, x[:, own]).requires_grad_() for x in full]
        alone = [x[:, own].requires_grad_() for x in full]
        with kernels.force("triton"), tuning.force_tiles(**SMALL_TILES):
            out = kernels.attention(*poisoned, causal=causal, segments=segments)[:, own]
            expected = kernels.attention(*alone, causal=causal)
            grads = torch.autograd.grad(out.sum(), poisoned)
            expected_grads = torch.autograd.grad(expected.sum(), alone)
        assert torch.allclose(out, expected)
        assert all(torch.allclose(g[:, own], w) for g, w in zip(grads, expected_grads, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the matrix products that the interpreter makes")
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 32), (False, 33)])
def test_attention_computes_only_tiles_with_a_visible_pair(monkeypatch, causal, window):
    segments = kernels.Segments(DOCUMENTS, DOCUMENTS)
    visible = segments.visible(causal, window)[0].unflatten(0, (7, 32)).unflatten(2, (7, 32)).any((1, 3)).sum().item()
    dot_calls = []

    def counting(*args):
        dot_calls.append(1)
        return kernels.launch.dot(*args)

    for module in (forward, backward_q, backward_kv):
        monkeypatch.setattr(module, "dot", counting)
    q, k, v = (x.requires_grad_() for x in qkv(1, 224, 224, 1, 1, 16))
    with kernels.force("triton"), tuning.force_tiles(**SMALL_TILES):
        out = kernels.attention(q, k, v, causal=causal, window=window, segments=segments)
        assert len(dot_calls) == 2 * visible
        out.sum().backward()
    assert len(dot_calls) == (2 + 3 + 4) * visible


def test_segment_bounds_are_the_intervals_of_ids():
    for kind in ("runs", "token", "random"):
        q, kv = segment_ids(kind, 2, 23), segment_ids(kind, 2, 31)
        for bounds, own_ids, other_ids in zip(kernels.Segments(q, kv).bounds(), (q, kv), (kv, q), strict=True):
            for row, row_ids in enumerate(own_ids.tolist()):
                for position, own in enumerate(row_ids):
                    same = (other_ids[row] == own).nonzero()[:, 0].tolist()
                    start, stop = (same[0], same[-1] + 1) if same else (other_ids.shape[1], 0)
                    whole = stop if stop - start == len(same) else 0
                    assert bounds[row, :, position].tolist() == [own, start, stop, whole]


def test_segments_cache_masks_and_bounds():
    segments = kernels.Segments(*[torch.tensor([[1, 1, 2]])] * 2)
    assert segments.mask(True, None, torch.float32) is segments.mask(True, None, torch.float32)
    assert segments.mask(True, None, torch.bfloat16).dtype == torch.bfloat16
    assert segments.bounds() is segments.bounds()
    assert segments.repeat_queries(2) is segments.repeat_queries(2)
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(2, 3\)"):
        kernels.Segments(segments.q, segments.kv.expand(2, -1))


def test_attention_ops_pass_opcheck():
    q, k, v = (x.requires_grad_() for x in qkv(1, 3, 3, 1, 1, 4))
    bounds = kernels.Segments(*[torch.ones(1, 3, dtype=torch.long, device=DEVICE)] * 2).bounds()
    bias = normal(1, 1, 3, 3).requires_grad_()
    table = [x.contiguous() for x in kernels.rope_table(torch.arange(3, device=DEVICE)[None], 4, 100.0)]
    arguments = q, k, v, bias, *bounds, *table, 9, 0, 0.5
    torch.library.opcheck(torch.ops.trireme.attention_forward.default, arguments)
    out, lse = torch.ops.trireme.attention_forward(*arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*arguments, out, lse, out)]
    torch.library.opcheck(torch.ops.trireme.attention_backward.default, (*detached, True))


@backends
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_attention_compiled_or_checkpointed_equals_eager(backend, how):
    ids = segment_ids("runs", 1, 40)
    inputs = [x.requires_grad_() for x in qkv(1, 40, 40, 1, 2, 16)]

    def layer(q, k, v):
        return kernels.attention(q * 1.5, k, v, causal=True, segments=kernels.Segments(ids, ids))

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
def test_attention_under_autocast_uses_autocast_dtype(backend):
    q, k, v = (x.float().requires_grad_() for x in qkv(1, 5, 5, 1, 1, 8))
    with kernels.force(backend), torch.autocast(DEVICE, torch.bfloat16):
        out = kernels.attention(q.bfloat16(), k, v, causal=True)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad.dtype == torch.float32
