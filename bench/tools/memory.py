"""Peak memory: measured on any device, and by arithmetic for the heads of a language model that may not be at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that ``run`` allocates at one time, its result included, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    del result
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def materialised_head_bytes(tokens: int, vocab: int) -> int:
    """Of cross_entropy(linear(hidden, weight).float(), targets) and its gradients, where the logits outweigh the rest.

    At the peak three float32 copies exist: log-probabilities, the gradient by them, and by the logits.
    """
    return 12 * tokens * vocab


def liger_head_bytes(tokens: int, vocab: int, width: int, itemsize: int) -> int:
    """Of Liger-Kernel's fused linear cross-entropy (0.8.2, as it is by default), its two gradients included.

    It adds ``torch.mm(...).float()`` to the gradient of the weight, so that its bytes are there two times and again in
    float32 (where it is float32 already, ``float`` copies nothing); a chunk has next_power_of_2(N / (V / D)) tokens.
    """
    chunk = 1 << (-(-tokens // -(-vocab // width)) - 1).bit_length()
    product = 0 if itemsize >= 4 else 4
    return itemsize * (tokens * width + chunk * vocab) + (2 * itemsize + product) * vocab * width
