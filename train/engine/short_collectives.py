"""DeepSpeed's gathers and reductions of stage 3 in a few operators each, whatever the number of ranks.

DeepSpeed cuts each tensor into a view a rank, and joins the views: 4,096 operators for each parameter in a world of as
many. A dry run needs what they allocate and move together, so here they are one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_scatter(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """DeepSpeed's ``reduce_scatter_coalesced``: this rank's part (numel,) of each tensor's mean over the ranks."""
    from deepspeed.runtime.comm import coalesced_collectives

    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    shares = [math.ceil(tensor.numel() / world_size) for tensor in tensors]
    padding = world_size * sum(shares) - sum(tensor.numel() for tensor in tensors)
    flat = tensors[0].view(-1)
    if len(tensors) > 1 or padding:
        flat = torch.cat(
            [*(tensor.view(-1) for tensor in tensors), torch.empty(padding, dtype=flat.dtype, device=flat.device)]
        )
    flat.div_(world_size)
    own = flat.narrow(0, rank * sum(shares), sum(shares))
    coalesced_collectives._torch_reduce_scatter_fn(flat, own, group=group)
    parts, begin = [], 0
    for tensor, share in zip(tensors, shares, strict=True):
        parts.append(own.narrow(0, begin, max(0, min(share, tensor.numel() - rank * share))))
        begin += share
    return parts


class WholeHandle:
    """A gather that is under way: ``wait`` gives each parameter its weights."""

    def __init__(self, handle: Any, params: Sequence[Any], flat: Tensor) -> None:
        self.handle, self.params, self.flat = handle, params, flat
        self.complete = False

    def wait(self, handle_dependency: bool = True) -> None:
        """Copy the weights out of the gathered tensor, as DeepSpeed does."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self.complete:
            return
        self.handle.wait()
        begin = 0
        for param in self.params:
            param.data = self.flat.narrow(0, begin, param.ds_numel).clone().view(param.ds_shape)
            param.ds_status = ZeroParamStatus.AVAILABLE
            begin += param.ds_numel
        self.complete = True


def gather(init: Any, params: Sequence[Any]) -> WholeHandle:
    """Several parameters of one type, whole, by one collective among all ranks."""
    from deepspeed.runtime.zero import partition_parameters

    for param in params:
        param.ds_status = partition_parameters.ZeroParamStatus.INFLIGHT
    rank, world_size = init._partition_rank(params[0]), init._partition_world_size(params[0])
    share = sum(param.ds_tensor.ds_numel for param in params)
    flat = torch.empty(share * world_size, dtype=params[0].ds_tensor.dtype)
    own = flat.narrow(0, share * rank, share)
    torch.cat([param.ds_tensor for param in params], out=own)
    group = init.get_partition_dp_group(params[0])
    return WholeHandle(partition_parameters._dist_allgather_fn(own, flat, group), params, flat)


def _can_be_short(init: Any, params: Sequence[Any]) -> bool:
    """Whether DeepSpeed would gather these among all ranks at once: not one alone, and not inside a host."""
    inside = any(param.ds_secondary_tensor is not None for param in params)
    types = {param.ds_tensor.dtype for param in params}
    return len(params) > 1 and not inside and len(types) == 1 and init._partition_world_size(params[0]) > 1


@contextlib.contextmanager
def in_place_of_deepspeeds() -> Iterator[None]:
    """Context in which DeepSpeed's stage 3 calls the functions of this module."""
    from deepspeed.runtime.zero import partition_parameters, stage3

    convert, reduce = partition_parameters.Init._convert_to_deepspeed_param, stage3.reduce_scatter_coalesced

    def convert_shortly(init: Any, param: Any) -> None:
        convert(init, param)
        usual = param.all_gather_coalesced

        def all_gather_coalesced(params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
            listed = sorted(params, key=lambda param: param.ds_id)
            if quantize or not _can_be_short(init, listed):
                return usual(listed, safe_mode=safe_mode, quantize=quantize)
            return gather(init, listed)

        param.all_gather_coalesced = all_gather_coalesced

    partition_parameters.Init._convert_to_deepspeed_param = convert_shortly
    stage3.reduce_scatter_coalesced = reduce_scatter
    try:
        yield
    finally:
        partition_parameters.Init._convert_to_deepspeed_param = convert
        stage3.reduce_scatter_coalesced = reduce
