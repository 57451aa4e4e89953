"""Attention by torch's own kernels: when they compute the same, that they do, and that the faster one is taken.

cuDNN's and flash kernels for variable lengths exist on CUDA only. Without a GPU the calls of them go to torch's CPU
kernels, so that layouts, offsets, grouped heads and gradients are those of a run.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.kernel_compare import DEVICE, assert_matches_reference, normal
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import reference, tuning
from kernels.triton_ops.attention.interface import attention_by
from kernels.triton_ops.attention.torch_backends import (
    CUDNN,
    FLASH,
    TRITON,
    AttentionTraits,
    eligible_backends,
    fastest_backend,
    torch_attention,
)

HALF = [torch.bfloat16, torch.float16]
H100 = AttentionTraits(torch.bfloat16, 128, 4, "causal", 2048, 2048, False, False, False, 0.1, (9, 0), False)
ALL, NO_CUDNN, OURS = (TRITON, CUDNN, FLASH), (TRITON, FLASH), (TRITON,)


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuning.clear_cache()
    yield
    tuning.clear_cache()


@pytest.mark.parametrize(
    ("change", "eligible"),
    [
        ({}, ALL),
        ({"dtype": torch.float16}, ALL),
        ({"kind": "full"}, ALL),
        ({"groups": 1, "roped": True}, ALL),
        ({"capability": (8, 0)}, ALL),
        ({"capability": (12, 1)}, ALL),
        ({"head_dim": 64}, ALL),
        ({"kind": "packed causal"}, NO_CUDNN),
        ({"kind": "packed full"}, NO_CUDNN),
        ({"deterministic": True}, NO_CUDNN),
        ({"head_dim": 192}, NO_CUDNN),
        ({"head_dim": 256}, NO_CUDNN),
        ({"head_dim": 192, "capability": (8, 9)}, NO_CUDNN),
        ({"head_dim": 256, "capability": (8, 9)}, OURS),
        ({"head_dim": 256, "capability": (12, 0)}, OURS),
        ({"head_dim": 100}, OURS),
        ({"head_dim": 512}, OURS),
        ({"dtype": torch.float32}, OURS),
        ({"dtype": torch.float64}, OURS),
        ({"windowed": True}, OURS),
        ({"biased": True}, OURS),
        ({"scale": 0.0}, OURS),
        ({"scale": -1.0}, OURS),
        ({"n_queries": 1}, OURS),
        ({"n_queries": 1024}, OURS),
        ({"n_queries": 1, "n_keys": 1}, OURS),
        ({"capability": (7, 5)}, OURS),
        ({"capability": (13, 0)}, OURS),
    ],
)
def test_torch_is_a_candidate_only_where_it_computes_the_same(change, eligible):
    assert eligible_backends(H100._replace(**change)) == eligible


@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("dtype", HALF)
def test_attention_of_whole_rows_equals_reference(dtype, backend, groups, causal, layout):
    q, k, v = (normal(2, 33, heads, 16, seed=heads) for heads in (2 * groups, 2, 2))
    assert_matches_reference(
        "torch",
        functools.partial(torch_attention, causal=causal, scale=0.3, offsets=None, backend=backend),
        functools.partial(reference.attention, causal=causal, scale=0.3),
        (q, k, v),
        dtype,
        layout,
    )


@pytest.fixture
def varlen_on_cpu():
    """Gives torch's operators under ``varlen_attn`` a CPU kernel, document by document, where there is no GPU."""
    if DEVICE == "cuda":
        yield
        return

    def documents(q, k, v, q_offsets, k_offsets, causal, scale):
        assert torch.equal(q_offsets, k_offsets)
        assert q_offsets.dtype == torch.int32
        parts = []
        for start, stop in zip(q_offsets[:-1].tolist(), q_offsets[1:].tolist(), strict=True):
            rows = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
            groups = q.shape[1] != k.shape[1]
            parts.append(F.scaled_dot_product_attention(*rows, is_causal=causal, scale=scale, enable_gqa=groups))
        return torch.cat(parts, 1).transpose(0, 1).contiguous()

    def forward(q, k, v, q_offsets, k_offsets, max_q, max_k, p, causal, return_debug_mask, *, scale, **options):
        longest = int(q_offsets.diff().max())
        assert (max_q, p) == (max_k, 0.0)
        assert longest <= max_q
        out = documents(q, k, v, q_offsets, k_offsets, causal, scale)
        state = torch.empty(2, dtype=torch.uint64)
        return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32), state, state.clone(), q.new_empty(0)

    def backward(grad, q, k, v, out, lse, q_offsets, k_offsets, max_q, max_k, p, causal, *state, scale, **options):
        def differentiate():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(documents(*leaves, q_offsets, k_offsets, causal, scale), leaves, grad)

        return thread.submit(differentiate).result()  # this thread is below autograd here

    with ThreadPoolExecutor(1) as thread, torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield


IDS = {
    "documents and padding": [[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    "a document a row": [[1] * 8, [1] * 8],
    "a document a token": [[*range(1, 9)], [*range(1, 9)]],
}
IN_TWO_PLACES = [[1, 1, 2, 2, 1, 1, 3, 3], [1] * 8]


@pytest.mark.parametrize("roped", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_attention_of_packed_rows_equals_reference(varlen_on_cpu, ids, groups, causal, roped):
    ids = torch.tensor(ids, device=DEVICE)
    segments = kernels.Segments(ids, ids)
    rope = kernels.rope_table(torch.arange(8, device=DEVICE)[None], 16, 100.0) if roped else None
    q, k, v = (normal(2, 8, heads, 16, seed=heads) for heads in (2 * groups, 2, 2))
    options = {"causal": causal, "segments": segments, "window": None, "bias": None, "rope": rope, "scale": 0.3}
    assert_matches_reference(
        "triton",
        functools.partial(attention_by, FLASH, **options),
        functools.partial(reference.attention, **options),
        (q, k, v),
        torch.bfloat16,
    )


def test_a_document_in_two_places_of_a_row_goes_to_our_kernels():
    ids = torch.tensor(IN_TWO_PLACES, device=DEVICE)
    q, k, v = (normal(2, 8, 2, 16, seed=seed).bfloat16() for seed in range(3))
    options = True, kernels.Segments(ids, ids), None, None, None, 0.3
    assert torch.equal(attention_by(FLASH, q, k, v, *options), attention_by(TRITON, q, k, v, *options))


def test_offsets_are_those_of_documents_in_runs():
    ids = torch.tensor(IDS["documents and padding"])
    assert kernels.Segments(ids, ids).run_offsets().tolist() == [0, 3, 5, 6, 8, 16]
    two_places = torch.tensor(IN_TWO_PLACES)
    assert kernels.Segments(two_places, two_places).run_offsets() is None
    assert kernels.Segments(ids, ids.clone()).run_offsets() is None  # other keys, which may be other documents


def attend_in(seconds, q, k, v, name):
    """Attention that takes so many seconds by the implementation of a name; None: it cannot run."""
    if seconds[name] is None:
        raise RuntimeError("No available kernel. Aborting execution.")
    time.sleep(seconds[name])
    return q * k * v


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({TRITON: 0.004, CUDNN: 0.002, FLASH: 0.0}, FLASH),
        ({TRITON: 0.004, CUDNN: 0.0, FLASH: 0.002}, CUDNN),
        ({TRITON: 0.0, CUDNN: 0.004, FLASH: 0.004}, TRITON),
        ({TRITON: 0.004, CUDNN: None, FLASH: 0.0}, FLASH),
        ({TRITON: 0.0, CUDNN: None, FLASH: None}, TRITON),
    ],
)
def test_the_fastest_backend_is_taken_once_measured(seconds, fastest):
    x = normal(2, 8)

    def choose():
        return fastest_backend(H100, lambda name, *qkv: attend_in(seconds, *qkv, name), x, x, x)

    assert choose() == TRITON
    with tuning.measuring_tiles():
        assert choose() == fastest
    tuning.clear_cache()
    assert choose() == fastest
    [(key, choice)] = tuning.used_choices().items()
    assert choice == fastest
    assert key == "attention_backend bfloat16 4x128 causal plain free 2048 triton|cudnn|flash"


def test_an_error_of_ours_is_no_slow_candidate():
    x = normal(2, 8)
    seconds = {TRITON: None, CUDNN: 0.0, FLASH: 0.0}
    with tuning.measuring_tiles(), pytest.raises(RuntimeError, match="No available kernel"):
        fastest_backend(H100, lambda name, *qkv: attend_in(seconds, *qkv, name), x, x, x)


def test_measuring_inside_a_checkpointed_layer_leaves_its_gradients():
    """The layer's forward pass measures and its second one does not, yet both save the same tensors."""
    x = normal(2, 8).requires_grad_()
    seconds = dict.fromkeys(ALL, 0.0)

    def layer(x):
        fastest_backend(H100, lambda name, *qkv: attend_in(seconds, *qkv, name), x, x, x)
        return x.square()

    with tuning.measuring_tiles():
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, 2 * x)
