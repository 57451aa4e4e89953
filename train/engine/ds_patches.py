"""Settings and patches of DeepSpeed: while it is imported, and while it builds an engine around empty parameters."""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def import_deepspeed() -> None:
    """Import DeepSpeed and what it would load later, once, before the fork server forks a worker.

    - DS_ACCELERATOR=cpu with a CPU build of torch, or it warns at every start that it found no accelerator.
    - Its optimizer layer and ``torch._dynamo``, seconds of imports, would load with the first optimizer: load them now.
    - Its op registry probes for a compiler and builds a shared-memory reduction that only inference uses: disable it.
    - Its Muon, which ZeRO imports and this project does not use, has a decorator of torch's compiler, whose import
      takes a second: import it with the compiler off.
    """
    import torch

    if not torch.backends.cuda.is_built():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    importlib.import_module("deepspeed.module_inject.auto_ep_layer")
    importlib.import_module("torch._dynamo")
    vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)
    before = os.environ.get("TORCHDYNAMO_DISABLE", "0")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    os.environ["TORCHDYNAMO_DISABLE"] = before


@contextmanager
def weights_come_later() -> Iterator[None]:
    """Inside, DeepSpeed builds an engine around parameters whose weights are filled in afterwards, by every rank.

    So rank 0 need not send its own to all others, parameter by parameter, and a flat tensor of weights need not be
    copied from them. What stage 3 partitions is whole for as long as it takes to cut this rank's share out of it.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import partition_parameters, stage_1_and_2

    building, flatten = True, stage_1_and_2._flatten_dense_tensors

    def allocate_flat(tensors: Sequence[Tensor]) -> Tensor:
        """DeepSpeed keeps this function for its gradients, which are there once the engine is built."""
        return tensors[0].new_zeros(sum(t.numel() for t in tensors)) if building else flatten(tensors)

    def partition(init: Any, param: Any) -> None:
        init._convert_to_deepspeed_param(param)
        param.partition()

    patches: list[tuple[Any, str, Any]] = [
        (DeepSpeedEngine, "_broadcast_model", lambda engine: None),
        (partition_parameters.Init, "_zero_init_param", partition),
        (stage_1_and_2, "_flatten_dense_tensors", allocate_flat),
        (bf16_optimizer, "_flatten_dense_tensors", allocate_flat),
        (bf16_optimizer, "see_memory_usage", lambda message, force: None),  # collects garbage and prints, each time
    ]
    originals = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, function in patches:
        setattr(owner, name, function)
    try:
        yield
    finally:
        building = False
        for (owner, name, _), original in zip(patches, originals, strict=True):
            setattr(owner, name, original)


def forget_process_groups() -> None:
    """Have DeepSpeed adopt the next process group of this process, as it did the first: it keeps what it has met."""
    groups, comm = (importlib.import_module(f"deepspeed.{name}") for name in ("utils.groups", "comm.comm"))
    vars(comm)["cdb"] = None
    for name, value in list(vars(groups).items()):
        if name.endswith(("_GROUP", "_GROUP_RANKS")):
            setattr(groups, name, {} if isinstance(value, dict) else None)
