"""Finds the fp32 master weights of each ZeRO stage, as shards of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from train.distributed.param_shard import ParamShard

Names = Mapping[Any, str]
"""Trained parameter of the objective (with DeepSpeed's attributes) -> its name, in the objective's order."""


class MasterWeights(Enum):
    """Who keeps the fp32 master weights, and so who clips and scales the gradients."""

    MODULE = "module"
    """Stage 0 in fp32: the module's parameters are the masters; DeepSpeed wraps no optimizer around torch's."""
    UNFUSED = "unfused"
    """Stage 0 in bf16 or fp16: DeepSpeed's unfused optimizer has an fp32 copy of each parameter."""
    ZERO = "zero"
    """Stages 1 to 3: flat fp32 tensors, partitioned over the ranks."""

    @classmethod
    def of(cls, stage: int, precision: str) -> MasterWeights:
        """The case of a ZeRO stage (0 to 3) and a precision ("fp32", "bf16", "fp16")."""
        if stage > 0:
            return cls.ZERO
        return cls.MODULE if precision == "fp32" else cls.UNFUSED


def trained_shards(engine: Any, masters: MasterWeights, names: Names, rank: int) -> Iterator[ParamShard]:
    """This rank's shards of a DeepSpeed engine's trained parameters; each ``holder`` is a tensor of fp32 masters."""
    zero = engine.optimizer
    if masters is not MasterWeights.ZERO:
        copies: dict[Any, Any] = _unfused_masters(zero) if masters is MasterWeights.UNFUSED else {}
        for param, name in names.items():
            yield ParamShard(name, 0, param.numel(), copies[param] if copies else param, 0)
    elif engine.zero_optimization_stage() == 3:
        yield from _shards_of_stage3(zero, names, rank)
    else:
        flats = _flat_masters(zero)
        for param, name in names.items():
            mapping = param._hp_mapping
            if mapping is not None:  # None: another rank holds all of it
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield ParamShard(name, low.start, low.numel, flats[mapping.param_group_index], high.start)


def _unfused_masters(optimizer: Any) -> dict[Any, Any]:
    """The fp32 copy of each parameter in DeepSpeed's unfused optimizer."""
    copies: dict[Any, Any] = {}
    for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        copies.update(zip(low, high, strict=True))
    return copies


def _flat_masters(zero: Any) -> list[Tensor]:
    """The flat fp32 masters of stages 1 and 2, one per parameter group, by either name that they have."""
    return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition


def _shards_of_stage3(zero: Any, names: Names, rank: int) -> Iterator[ParamShard]:
    for param, name in names.items():
        group, offset, share = zero.grad_position[zero.get_param_id(param)]
        start = rank * share
        numel = min(share, param.ds_numel - start)  # the last ranks' shares are padded
        if numel > 0:
            yield ParamShard(name, start, numel, zero.fp32_partitioned_groups_flat[group], offset)


def shards_by_flat(
    engine: Any, names: Names, trained: list[ParamShard], shapes: Mapping[str, torch.Size]
) -> dict[Tensor, list[tuple[torch.Size, ParamShard]]]:
    """For each flat tensor of masters (stages 1 to 3) its parameters in ZeRO's order, the same order on every rank.

    Each entry is (whole shape, this rank's shard), with an empty shard where other ranks hold all of it: the form of
    ``Muon.shards``.
    """
    zero, own = engine.optimizer, {shard.name: shard for shard in trained}
    if engine.zero_optimization_stage() == 3:
        flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
    else:
        flats, groups = _flat_masters(zero), getattr(zero, "bf16_groups", None) or zero.bit16_groups
    by_flat: dict[Tensor, list[tuple[torch.Size, ParamShard]]] = {}
    for flat, group in zip(flats, groups, strict=True):
        ordered = [names[param] for param in group]
        by_flat[flat] = [(shapes[name], own.get(name, ParamShard(name, 0, 0, flat, 0))) for name in ordered]
    return by_flat


@torch.no_grad()
def copy_masters_to_weights(engine: Any, masters: MasterWeights) -> None:
    """Copy the fp32 masters into the weights that the forward pass uses, in their precision, on every rank."""
    zero = engine.optimizer
    if masters is MasterWeights.MODULE:
        return
    if masters is MasterWeights.UNFUSED:
        for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            torch._foreach_copy_(list(low), list(high))
    elif engine.zero_optimization_stage() == 3:
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero._post_step(set())
    else:
        zero.update_lp_params()


def gradient_buffers(engine: Any) -> Iterator[Tensor]:
    """The tensors in which a DeepSpeed engine keeps gradients beside those of the parameters."""
    zero = engine.optimizer
    for name in ("grad_partitions_flat_buffer", "averaged_gradients"):
        kept = getattr(zero, name, None)
        for tensors in kept.values() if isinstance(kept, dict) else [[kept]]:
            yield from (tensor for tensor in tensors or () if isinstance(tensor, Tensor))
    for group in engine.basic_optimizer.param_groups:
        yield from (param.grad for param in group["params"] if param.grad is not None)
