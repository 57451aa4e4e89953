"""Peak memory, measured on any device, and by formula for two heads of a language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that ``run`` allocates beyond what was allocated before, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def materialised_head_bytes(tokens: int, vocab: int) -> int:
    """Peak bytes of cross_entropy(linear(hidden, weight).float(), targets) with gradients, logits alone.

    At the peak three float32 copies exist: log-probabilities, the gradient by them, and by the logits.
    """
    return 12 * tokens * vocab


def liger_head_bytes(tokens: int, vocab: int, width: int, itemsize: int) -> int:
    """Peak bytes of Liger-Kernel's fused linear cross-entropy (0.8.2, default options), with its two gradients.

    It adds ``torch.mm(...).float()`` to the gradient of the weight, which therefore exists twice in its own dtype and
    once in float32 (unless it is float32 already); a chunk has next_power_of_2(N / (V / D)) tokens.
    """
    chunk = 1 << (-(-tokens // -(-vocab // width)) - 1).bit_length()
    product = 0 if itemsize >= 4 else 4
    return itemsize * (tokens * width + chunk * vocab) + (2 * itemsize + product) * vocab * width
