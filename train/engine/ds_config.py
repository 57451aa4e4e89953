"""DeepSpeed's settings for a run as plain values, without importing DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.config.schema import Config

MB = 1 << 20
GPU_BUCKET_MB = 200
"""Reduced at a time between GPUs: large enough for a network's full speed, small enough that the first bucket is full,
and on its way, long before the backward pass ends. DeepSpeed's own is 5e8 elements, all of a model below that size.
"""
MOST_ELEMENTS = 500_000_000
"""Elements of a bucket where nothing else bounds it; DeepSpeed's own."""


@dataclass(frozen=True)
class EngineInventory:
    """The kind of device, the ranks and the trained elements that a run's engine has."""

    device: str
    """torch's name for it: "cpu" or "cuda"."""
    world_size: int
    elements: int


@dataclass(frozen=True)
class CommPlan:
    """How ranks exchange gradients and weights: the values of ``zero.*`` once defaults are chosen."""

    overlap: bool
    """Gradients are reduced beside the backward pass, on a stream of their own."""
    bucket: int
    """Elements that are reduced at a time."""
    prefetch: int | None
    """Elements of weights that stage 3 gathers ahead of their use; None: DeepSpeed's own."""
    hpz: int
    """Ranks that hold a second copy of stage 3's weights between them, for the gathers of the backward pass."""
    dtype: str | None
    """Number format in which gradients are summed over ranks; None: their own."""


def plan_communication(config: Config, inventory: EngineInventory) -> CommPlan:
    """Choose what the keys of ``zero`` leave open, by device, stage, precision and world.

    A CPU has no second stream, so there nothing overlaps. bf16 gradients are summed over ranks in fp32: a ring adds one
    term after the other, and each addition in bf16 keeps 8 bits.
    """
    zero, between_gpus = config.zero, inventory.device == "cuda" and inventory.world_size > 1
    overlap = between_gpus and zero.stage > 0 if zero.overlap is None else zero.overlap
    by_precision = "fp32" if config.precision.name == "bf16" else None
    dtype = by_precision if zero.comm_dtype == "auto" else zero.comm_dtype
    gradient_bytes = 4 if "fp32" in (dtype, config.precision.name) else 2
    weight_bytes = 4 if config.precision.name == "fp32" else 2
    bucket_mb = zero.bucket_mb or (GPU_BUCKET_MB if between_gpus else None)
    bucket = bucket_mb * MB // gradient_bytes if bucket_mb else MOST_ELEMENTS
    prefetch = None if zero.prefetch_mb is None else zero.prefetch_mb * MB // weight_bytes
    # A world that lost ranks may have a number of them that the groups do not divide.
    hpz = zero.hpz if inventory.world_size % zero.hpz == 0 else 1
    # A bucket larger than the model would be allocated, and on a CPU paged in, for nothing at every backward pass.
    return CommPlan(overlap, max(1, min(bucket, inventory.elements)), prefetch, hpz, dtype)


def deepspeed_config(
    config: Config, micro: int, accumulation: int, inventory: EngineInventory, *, plain: bool
) -> dict[str, Any]:
    """DeepSpeed's settings for a run. Without ZeRO in fp32 (``plain``) the engine clips gradients itself."""
    plan, pin = plan_communication(config, inventory), inventory.device == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": plan.overlap,
        "reduce_bucket_size": plan.bucket,
        "zero_hpz_partition_size": plan.hpz,
    }
    if plan.prefetch is not None:
        zero["stage3_prefetch_bucket_size"] = plan.prefetch
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if plain else config.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # plain SGD is one
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
    }
    if plan.dtype is not None:
        settings["communication_data_type"] = plan.dtype
    if config.precision.name == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if config.zero.stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.precision.name == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return settings
