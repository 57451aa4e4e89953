"""DeepSpeed's settings for a run as plain values, without importing DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch

from train.config.schema import Config


def deepspeed_config(config: Config, micro: int, accumulation: int, *, plain: bool) -> dict[str, Any]:
    """DeepSpeed's settings for a run. Without ZeRO in fp32 (``plain``) the engine clips gradients itself."""
    zero: dict[str, Any] = {"stage": config.zero.stage, "contiguous_gradients": True, "overlap_comm": False}
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if plain else config.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # plain SGD is one
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
        "steps_per_print": None,
    }
    if config.precision.name == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if config.zero.stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.precision.name == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return settings
