"""Settings and patches that DeepSpeed needs while it is imported, so that a start is quick and quiet on any machine."""

from __future__ import annotations

import importlib
import os
from collections import defaultdict


def import_deepspeed() -> None:
    """Import DeepSpeed and what it would load later, once, before the fork server forks a worker.

    - A CPU build of torch is told to DeepSpeed, which else warns at every start that it found no accelerator.
    - Its optimizer layer and ``torch._dynamo`` load with the first optimizer, seconds later: here they are paid for
      once.
    - Its op registry probes for a compiler and builds a shared-memory reduction that only inference uses: switched off.
    - Its Muon, which ZeRO imports and this project does not use, is decorated for torch's compiler as it is imported,
      which loads the compiler for a second: imported with the compiler off.
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
