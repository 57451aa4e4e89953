"""Tests of DeepSpeed's settings: each device, stage, precision and world, as DeepSpeed itself reads them."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import gloo_ranks

from train.config import load as configuration
from train.engine.ds_config import GPU_BUCKET_MB, MB, MOST_ELEMENTS, EngineInventory, deepspeed_config
from train.errors import UserError

LARGE = 7_000_000_000
"""Elements of a model that no bucket holds."""


def parsed(keys: list[str], device: str = "cpu", world_size: int = 1, elements: int = LARGE):
    """The settings of a run, in DeepSpeed's own configuration objects."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = gloo_ranks.compose(*keys)
    plain = config.zero.stage == 0 and config.precision.name == "fp32"
    inventory = EngineInventory(device, world_size, elements)
    return DeepSpeedConfig(deepspeed_config(config, 2, 3, inventory, plain=plain))


@pytest.mark.parametrize(
    ("device", "world_size", "stage", "precision"),
    itertools.product(("cpu", "cuda"), (1, 8), (0, 1, 2, 3), ("fp32", "bf16", "fp16")),
)
def test_defaults_by_device_world_stage_and_precision(device: str, world_size: int, stage: int, precision: str):
    read = parsed([f"zero={stage}", f"precision={precision}"], device, world_size)
    between_gpus = device == "cuda" and world_size > 1
    zero = read.zero_config
    assert zero.stage == stage
    assert zero.overlap_comm == (between_gpus and stage > 0)
    width = 2 if precision == "fp16" else 4  # bf16 is summed in fp32
    assert zero.reduce_bucket_size == (GPU_BUCKET_MB * MB // width if between_gpus else MOST_ELEMENTS)
    assert zero.prefetch_bucket_size == 50_000_000
    assert zero.zero_hpz_partition_size == 1
    assert read.communication_data_type == (torch.float32 if precision == "bf16" else None)
    assert not read.timers_config.enabled
    assert not read.wall_clock_breakdown
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    accumulated = {"grad_accum_dtype": "fp32"} if precision == "bf16" and stage else {}
    assert read.grad_accum_dtype == accumulated.get("grad_accum_dtype")
    assert read.gradient_clipping == (0.0 if (stage, precision) == (0, "fp32") else 1.0)
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (2, 3)


@pytest.mark.parametrize(
    ("keys", "device", "world_size", "field", "expected"),
    [
        (["zero=2", "zero.overlap=false"], "cuda", 8, "overlap_comm", False),
        (["zero=2", "zero.overlap=true"], "cpu", 2, "overlap_comm", True),
        (["zero=2", "zero.bucket_mb=64"], "cpu", 1, "reduce_bucket_size", 64 * MB // 4),
        (["zero=2", "zero.bucket_mb=64", "precision=bf16"], "cuda", 8, "reduce_bucket_size", 64 * MB // 4),
        (
            ["zero=2", "zero.bucket_mb=64", "precision=bf16", "zero.comm_dtype=bf16"],
            *("cuda", 8, "reduce_bucket_size", 64 * MB // 2),
        ),
        (["zero=3", "zero.prefetch_mb=0"], "cuda", 8, "prefetch_bucket_size", 0),
        (["zero=3", "zero.prefetch_mb=10", "precision=bf16"], "cuda", 8, "prefetch_bucket_size", 10 * MB // 2),
        (["zero=3", "zero.hpz=4", "cluster.workers=8", "batch.global=8"], "cuda", 8, "zero_hpz_partition_size", 4),
        (["zero=3", "zero.hpz=4", "cluster.workers=8", "batch.global=8"], "cuda", 6, "zero_hpz_partition_size", 1),
    ],
)
def test_keys_of_zero_reach_deepspeed(keys: list[str], device: str, world_size: int, field: str, expected):
    assert getattr(parsed(keys, device, world_size).zero_config, field) == expected


def test_bucket_is_never_larger_than_the_model():
    assert parsed(["zero=2"], elements=1000).zero_config.reduce_bucket_size == 1000
    assert parsed(["zero=3"], "cuda", 8, elements=1000).zero_config.reduce_bucket_size == 1000


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["precision=bf16"], torch.float32),
        (["precision=bf16", "zero.comm_dtype=fp32"], torch.float32),
        (["precision=bf16", "zero.comm_dtype=bf16"], torch.bfloat16),
        (["precision=fp16", "zero.comm_dtype=fp32"], torch.float32),
        (["precision=fp16"], None),
    ],
)
def test_format_of_gradients_between_ranks(keys: list[str], expected: torch.dtype | None):
    assert parsed(["zero=2", *keys], "cuda", 8).communication_data_type == expected


@pytest.mark.parametrize(
    ("keys", "cure"),
    [
        (["zero=2", "zero.hpz=2"], "zero.stage=3"),
        (["zero=2", "zero.prefetch_mb=50"], "zero.stage=3"),
        (["zero=0", "zero.overlap=true"], "zero.stage 1, 2 or 3"),
        (["zero=2", "zero.bucket_mb=0"], "set it to 50 or more"),
        (["zero=3", "zero.hpz=3", "cluster.workers=4"], "or to 2"),
        (["zero=2", "zero.comm_dtype=bf16"], "precision=bf16"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_their_cure(keys: list[str], cure: str):
    with pytest.raises(UserError) as error:
        configuration.load([*gloo_ranks.TINY, *keys])
    assert cure in str(error.value)
    assert keys[1].split("=")[0] in str(error.value)
