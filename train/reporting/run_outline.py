"""Outline of a run in numbers, shown before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.distributed import process_group
from train.distributed.device import Device, describe
from train.reporting.meter import DeviceRates
from train.reporting.throughput import estimated_seconds, peak_flops
from train.state.train_state import TrainState


def outline(
    config: Config,
    world: process_group.DistContext,
    corpus: Corpus,
    objective: Any,
    progress: TrainState,
    rates: DeviceRates,
) -> dict[str, Any]:
    """Fields of the plan event: sizes of model, work and corpus, and ``estimate_s`` seconds for the steps that are
    left.
    """
    batch = config.batch
    tokens_per_step, tokens = batch.global_ * batch.seq_len, batch.sequences(config.steps) * batch.seq_len
    train_tokens = corpus.split("train").tokens
    left = (tokens - batch.sequences(progress.step) * batch.seq_len) * rates.flops_per_token
    return {
        "model": config.run.name,
        "params": _numel(objective.parameters()),
        "trained": _numel(p for p in objective.parameters() if p.requires_grad),
        "steps": config.steps,
        "start_step": progress.step,
        "tokens": tokens,
        "tokens_per_step": tokens_per_step,
        "corpus_tokens": train_tokens,
        "epochs": tokens / max(train_tokens, 1),
        "flops_per_token": rates.flops_per_token,
        "zero_stage": config.zero.stage,
        "precision": config.precision.name,
        "device": describe(world.device).name,
        "peak_flops": rates.peak,
        "measured_flops": rates.measured,
        "workers": world.size,
        "vocab_size": corpus.tokenizer.vocab_size,
        "estimate_s": estimated_seconds(left, world.size, rates.measured),
    }


def precision_cost(device: Device, precision: str) -> str | None:
    """The cost of fp32 on a GPU, in words, with the cure; None for other devices and precisions."""
    if device.type != "cuda" or precision != "fp32":
        return None
    better = "bf16" if device.bf16 else "fp16"
    fast, slow = (peak_flops(device.name, name) for name in (better, "fp32"))
    rates = f", {slow / 1e12:.3g} TFLOP/s here instead of {fast / 1e12:.3g}" if fast and slow else ""
    return (
        f"fp32 on a GPU: matrix products do without its tensor cores{rates}, and activations take twice the memory. "
        f"precision={better} uses them, with master weights in fp32 all the same"
    )


def _numel(parameters: Iterable[Any]) -> int:
    return sum(
        p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in parameters
    )  # ZeRO-3 leaves a parameter no shape
