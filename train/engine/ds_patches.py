"""Settings and patches applied while DeepSpeed is imported, for a quick and quiet start."""

from __future__ import annotations

import importlib
import os
from collections import defaultdict


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


def forget_process_groups() -> None:
    """Have DeepSpeed adopt the next process group of this process, as it did the first: it keeps what it has met."""
    groups, comm = (importlib.import_module(f"deepspeed.{name}") for name in ("utils.groups", "comm.comm"))
    vars(comm)["cdb"] = None
    for name, value in list(vars(groups).items()):
        if name.endswith(("_GROUP", "_GROUP_RANKS")):
            setattr(groups, name, {} if isinstance(value, dict) else None)
