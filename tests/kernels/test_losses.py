"""cross_entropy and linear_cross_entropy against the float64 reference, on torch and on Triton."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import kernel_compare
from helpers.kernel_compare import DEVICE, backends, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import kernels
from bench.tools.memory import liger_head_bytes, materialised_head_bytes, peak_bytes
from kernels import linear_ce, reference, tuning
from kernels.triton_ops.cross_entropy import cross_entropy_backward, cross_entropy_forward

IGNORE = -100
VOCABULARIES = [1, 2, 17, 101, 999, 1025] if DEVICE == "cpu" else [1, 2, 17, 101, 999, 1025, 50257, 128256, 300001]
REGULARISERS = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.1}]
few_examples = settings(kernel_compare.quick, max_examples=12)


def random_targets(tokens: int, vocab: int, ignored: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return targets.to(DEVICE)


def loss_sum_of(op, targets: Tensor, **settings):
    """The sum of losses alone, as a function of the inputs that have gradients."""
    return lambda *inputs: op(*inputs, targets, **settings)[0]


def forced_tiles(tiles: dict[str, int]):
    return tuning.force_tiles(**{f"cross_entropy_{part}": tiles for part in ("forward", "backward", "with_grad")})


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    """Makes five tokens three chunks: two, two and one."""
    monkeypatch.setattr(linear_ce, "MIN_CHUNK_TOKENS", 2)


@backends
@few_examples
@given(
    dtype=kernel_compare.dtypes,
    tokens=st.sampled_from([0, 1, 5, 31]),
    vocab=st.sampled_from(VOCABULARIES),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    layout=kernel_compare.layouts,
    regularisers=st.sampled_from(REGULARISERS),
)
def test_cross_entropy_equals_reference(backend, dtype, tokens, vocab, ignored, layout, regularisers):
    targets = random_targets(tokens, vocab, ignored)
    ops = (loss_sum_of(op, targets, **regularisers) for op in (kernels.cross_entropy, reference.cross_entropy))
    kernel_compare.assert_matches_reference(backend, *ops, (normal(tokens, vocab) * 5,), dtype, layout)


@backends
@few_examples
@given(
    dtype=kernel_compare.dtypes,
    tokens=st.sampled_from([0, 1, 5, 31]),
    vocab=st.sampled_from([2, 17, 101]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    layout=kernel_compare.layouts,
    chunk_tokens=st.sampled_from([4, 1024]),
    regularisers=st.sampled_from(REGULARISERS),
)
def test_linear_cross_entropy_equals_reference(
    backend, dtype, tokens, vocab, ignored, layout, chunk_tokens, regularisers
):
    targets = random_targets(tokens, vocab, ignored)
    inputs = normal(tokens, 12), normal(vocab, 12, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_ce, "MIN_CHUNK_TOKENS", chunk_tokens)
        ops = (
            loss_sum_of(op, targets, **regularisers)
            for op in (kernels.linear_cross_entropy, reference.linear_cross_entropy)
        )
        kernel_compare.assert_matches_reference(backend, *ops, inputs, dtype, layout)


@backends
def test_losses_by_target_are_those_that_are_summed(backend, small_chunks):
    targets = random_targets(9, 11, 0.3)
    hidden, weight = normal(9, 4).requires_grad_(), normal(11, 4, seed=1).requires_grad_()
    with kernels.force(backend):
        total, count, losses = kernels.linear_cross_entropy_by_target(hidden, weight, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses, expected.detach().to(losses.dtype))
    torch.testing.assert_close(losses.sum(), total.detach())
    assert count == (targets != IGNORE).sum()
    assert not losses.requires_grad


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_sum_is_float32_or_wider_and_count_int64(backend, dtype):
    targets = random_targets(7, 5)
    with kernels.force(backend):
        for op, inputs in ((kernels.cross_entropy, [(7, 5)]), (kernels.linear_cross_entropy, [(7, 3), (5, 3)])):
            loss, count = op(*(normal(*shape).to(dtype) for shape in inputs), targets)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert (loss.shape, count.shape, count.dtype) == ((), (), torch.int64)
            assert (loss.device.type, count.device.type) == (DEVICE, DEVICE)
            assert count == (targets != IGNORE).sum()


@backends
def test_cross_entropy_of_extreme_logits_is_finite_and_exact(backend):
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], device=DEVICE, requires_grad=True)
    with kernels.force(backend):
        loss, count = kernels.cross_entropy(logits, torch.tensor([1, 1], device=DEVICE))
    loss.backward()
    assert (loss.item(), count.item()) == (1e4, 2)
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1, -1, 0], [0, 0, 0]]


@backends
def test_cross_entropy_ignores_logits_of_minus_infinity(backend):
    logits = normal(3, 700).float()
    logits[:, :650] = float("-inf")  # so that whole blocks are -inf
    short, targets = logits[:, 650:].clone().requires_grad_(), torch.tensor([3, 49, 0], device=DEVICE)
    logits.requires_grad_()
    tiles = {"BLOCK_R": 2, "BLOCK_V": 256, "num_warps": 4}
    with kernels.force(backend), forced_tiles(tiles):
        (loss, _), (expected, _) = kernels.cross_entropy(logits, targets + 650), reference.cross_entropy(short, targets)
        (grad,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(loss, expected)
    assert torch.allclose(grad[:, 650:], torch.autograd.grad(expected, short)[0], atol=1e-6)
    assert not grad[:, :650].any()


@pytest.mark.parametrize(
    "tiles", [{"BLOCK_R": 4, "BLOCK_V": 128}, {"BLOCK_R": 2, "BLOCK_V": 256}, {"BLOCK_R": 8, "BLOCK_V": 1024}]
)
def test_losses_with_any_tiles_equal_reference(tiles):
    targets = random_targets(13, 601)
    with forced_tiles({**tiles, "num_warps": 4}):
        for op, right, inputs in (
            (kernels.cross_entropy, reference.cross_entropy, (normal(13, 601),)),
            (kernels.linear_cross_entropy, reference.linear_cross_entropy, (normal(13, 8), normal(601, 8, seed=1))),
        ):
            kernel_compare.assert_matches_reference(
                "triton", *(loss_sum_of(o, targets, label_smoothing=0.1) for o in (op, right)), inputs, torch.float32
            )


@backends
def test_cross_entropy_of_target_outside_vocabulary_is_nan_or_raises(backend):
    logits = normal(2, 5).float().requires_grad_()
    with kernels.force(backend):
        if backend == "torch":
            with pytest.raises((IndexError, RuntimeError)):
                kernels.cross_entropy(logits, torch.tensor([5, 0]))
            return
        loss, _ = kernels.cross_entropy(logits, torch.tensor([5, 0], device=DEVICE))
        (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


@backends
@pytest.mark.parametrize("regularisers", REGULARISERS[::3])
def test_loss_gradients_pass_gradcheck(backend, regularisers, small_chunks):
    targets = torch.tensor([1, IGNORE, 3, 0, 10], device=DEVICE)
    logits, hidden, weight = (normal(*s, seed=s[0]).requires_grad_() for s in ((5, 11), (5, 4), (11, 4)))
    with kernels.force(backend):
        assert torch.autograd.gradcheck(
            lambda x: 0.3 * kernels.cross_entropy(x, targets, **regularisers)[0], logits, fast_mode=True
        )
        linear = functools.partial(kernels.linear_cross_entropy, targets=targets, **regularisers)
        assert torch.autograd.gradcheck(lambda h, w: 0.3 * linear(h, w)[0], (hidden, weight), fast_mode=True)


@backends
def test_linear_cross_entropy_rerun_is_bit_identical(backend, small_chunks):
    targets = random_targets(31, 101)
    hidden, weight = (normal(*s).bfloat16().requires_grad_() for s in ((31, 16), (101, 16)))
    with kernels.force(backend):
        runs = []
        for _ in range(2):
            loss, _ = kernels.linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
            runs.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@backends
def test_linear_cross_entropy_trains_either_input_and_under_autocast(backend, small_chunks):
    targets = torch.tensor([1, IGNORE, 3, 0, 10], device=DEVICE)
    hidden, weight = normal(5, 4).float(), normal(11, 4, seed=1).float()
    with kernels.force(backend):
        kernels.linear_cross_entropy(hidden.requires_grad_(), weight, targets)[0].backward()
        kernels.linear_cross_entropy(hidden.detach(), weight.requires_grad_(), targets)[0].backward()
        both = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, _ = kernels.linear_cross_entropy(*both, targets)
        loss.backward()
    assert loss.dtype == torch.float32
    for once, again in ((hidden, both[0]), (weight, both[1])):
        assert again.grad.dtype == torch.float32
        assert torch.allclose(once.grad, again.grad, atol=3e-2)


@backends
def test_linear_cross_entropy_without_grad_computes_no_gradient(backend, small_chunks):
    weight = normal(11, 4, seed=1).requires_grad_()
    hidden, targets = normal(5, 4).requires_grad_(), torch.tensor([1, IGNORE, 3, 0, 10], device=DEVICE)
    products = []
    for enabled in (True, False):
        with (
            kernels.force(backend),
            torch.set_grad_enabled(enabled),
            profile(activities=[ProfilerActivity.CPU]) as profiled,
        ):
            kernels.linear_cross_entropy(hidden, weight, targets)
        products.append(
            sum(event.count for event in profiled.key_averages() if event.key in ("aten::mm", "aten::addmm"))
        )
    assert products == [9, 3], (
        "each of three chunks has a product for its logits, and two more for its gradients where they are needed"
    )


@backends
def test_float16_gradients_are_scaled_by_unrounded_factor(backend):
    """1 + 2^-11 - 2^-15 would be 1 if it were rounded to float16 before the product, as torch does on CUDA."""
    inputs = [normal(64, 8, seed=seed).half().requires_grad_() for seed in (0, 1)]
    targets, factor = random_targets(64, 64), 1 + 2**-11 - 2**-15
    with kernels.force(backend):
        unscaled, scaled = (
            torch.autograd.grad(loss_factor * kernels.linear_cross_entropy(*inputs, targets)[0], inputs)
            for loss_factor in (1.0, factor)
        )
    for grad, scaled_grad in zip(unscaled, scaled, strict=True):
        assert torch.equal((grad.float() * factor).half(), scaled_grad)
        assert not torch.equal(grad, scaled_grad)


@backends
@pytest.mark.parametrize("reentrant", [False, True])
def test_losses_checkpointed_equal_plain(backend, reentrant, small_chunks):
    targets = random_targets(9, 11, 0.2)
    hidden, weight = normal(9, 4).requires_grad_(), normal(11, 4, seed=1).requires_grad_()

    def head(x: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x * 2, weight, targets)[0] + kernels.cross_entropy(x * 3, targets % 4)[0]

    with kernels.force(backend):
        plain = torch.autograd.grad(head(hidden), (hidden, weight))
        head_again = checkpoint(head, hidden, use_reentrant=reentrant)
        weight.grad = hidden.grad = None
        head_again.backward()
    for expected, leaf in zip(plain, (hidden, weight), strict=True):
        assert torch.equal(expected, leaf.grad)


@backends
def test_loss_ops_pass_opcheck(backend, small_chunks):
    targets = random_targets(5, 11)
    logits, hidden, weight = (normal(*s, seed=s[0]).float().requires_grad_() for s in ((5, 11), (5, 4), (11, 4)))
    settings = IGNORE, 0.1, 0.01
    with kernels.force(backend):
        torch.library.opcheck(linear_ce.linear_cross_entropy_forward, (hidden, weight, targets, *settings, True, True))
        torch.library.opcheck(linear_ce.scaled, (torch.ones(3, device=DEVICE), torch.tensor(2.0, device=DEVICE)))
        if backend == "triton":
            torch.library.opcheck(cross_entropy_forward, (logits, targets, *settings))
            lse = logits.detach().logsumexp(-1)
            plain = torch.ones_like(lse), logits.detach(), targets, lse, *settings
            torch.library.opcheck(cross_entropy_backward, plain)


@backends
def test_losses_compiled_equal_eager(backend, small_chunks):
    targets = random_targets(9, 11, 0.2)
    hidden, weight = normal(9, 4).requires_grad_(), normal(11, 4, seed=1).requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        whole, count = kernels.cross_entropy(x @ w.T, targets, z_loss=0.1)
        return (whole + kernels.linear_cross_entropy(x, w, targets, label_smoothing=0.1)[0]) / count

    with kernels.force(backend):
        expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
        torch.compiler.reset()
        actual = torch.autograd.grad(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight), (hidden, weight)
        )
    for a, b in zip(expected, actual, strict=True):
        assert torch.allclose(a, b)


@backends
def test_linear_cross_entropy_peak_is_gradients_and_one_chunk(backend, monkeypatch):
    tokens, vocab, width = 512, 2048, 128
    monkeypatch.setattr(linear_ce, "MIN_CHUNK_TOKENS", 32)
    hidden, weight = (normal(*s).float().requires_grad_() for s in ((tokens, width), (vocab, width)))
    targets = random_targets(tokens, vocab)

    def run(head) -> tuple[Tensor, ...]:
        loss, count = head(hidden, weight, targets)
        return torch.autograd.grad(loss / count, (hidden, weight))

    def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum"), (targets != IGNORE).sum()

    device = torch.device(DEVICE)
    with kernels.force(backend):
        run(kernels.linear_cross_entropy)  # allocates operator tables and workspaces, which exist once
        peak = peak_bytes(lambda: run(kernels.linear_cross_entropy), device)
    # torch's log-probabilities are a copy; the interpreter works on copies of what it reads and of what it writes.
    copies = {"torch": 2, "triton": 1 if DEVICE == "cuda" else 3}[backend]
    assert peak <= 1.1 * 4 * (vocab * width + tokens * width + copies * 32 * vocab)
    materialised_peak = peak_bytes(lambda: run(materialised), device)
    assert materialised_peak == pytest.approx(materialised_head_bytes(tokens, vocab), rel=0.1)
    assert peak < materialised_peak / 5


@pytest.mark.parametrize(
    ("tokens", "width"), [(8192, 4096), (16384, 2048), (32768, 4096), (65536, 2048), (131072, 4096)]
)
def test_head_peak_at_128k_vocabulary_is_below_liger(tokens, width):
    vocab, size = 128256, 2
    peak = size * (vocab * width + tokens * width + linear_ce.tokens_per_chunk(tokens) * vocab)
    assert peak <= liger_head_bytes(tokens, vocab, width, size)
    assert peak <= materialised_head_bytes(tokens, vocab) / 8
