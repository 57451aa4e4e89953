"""Outline of a run in numbers, shown before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.distributed import process_group
from train.kernel_setup import DTYPES
from train.reporting.throughput import estimated_seconds, matmul_rate
from train.state.train_state import TrainState


def outline(
    config: Config, world: process_group.DistContext, corpus: Corpus, objective: Any, progress: TrainState
) -> dict[str, Any]:
    """Fields of the plan event: sizes of model, work and corpus, and ``estimate_s`` seconds for the steps that are
    left.
    """
    tokens_per_step = config.batch.global_ * config.batch.seq_len
    train_tokens, flops = corpus.split("train").tokens, objective.flops_per_token(config.batch.seq_len)
    left = (config.steps - progress.step) * tokens_per_step * flops
    return {
        "model": config.run.name,
        "params": _numel(objective.parameters()),
        "trained": _numel(p for p in objective.parameters() if p.requires_grad),
        "steps": config.steps,
        "start_step": progress.step,
        "tokens": tokens_per_step * config.steps,
        "tokens_per_step": tokens_per_step,
        "corpus_tokens": train_tokens,
        "epochs": tokens_per_step * config.steps / max(train_tokens, 1),
        "flops_per_token": flops,
        "zero_stage": config.zero.stage,
        "precision": config.precision.name,
        "workers": world.size,
        "vocab_size": corpus.tokenizer.vocab_size,
        # from a hundredth of a second of matrix products
        "estimate_s": estimated_seconds(left, world.size, matmul_rate(world.device, DTYPES[config.precision.name])),
    }


def _numel(parameters: Iterable[Any]) -> int:
    return sum(
        p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in parameters
    )  # ZeRO-3 leaves a parameter no shape
