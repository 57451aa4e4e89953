"""Runs torch's operators on shapes alone: floats have no memory behind them, integers are computed as ever.

Shapes may depend on integers (which tokens are masked, where documents begin), never on floats, so every shape is as in
a run. A number that is read from a float tensor is 0: no loss, norm or count of infinities looks wrong.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from kernels import dispatch, torch_ops
from kernels.linear_ce import linear_cross_entropy_forward, tokens_per_chunk
from train.engine import short_collectives
from train.planning.allocations import AllocationLog

TORCH_ROOM = "/torch/"
OURS = (str(Path(__file__).parent), short_collectives.__file__)
"""Files whose calls are made for whoever calls them."""
GATHERS = ("partition_parameters.py", "partitioned_param_coordinator.py")
"""Files of DeepSpeed that allocate weights gathered from all ranks."""
LOSS = torch.ops.trireme.linear_cross_entropy_forward.default
DISPATCH = ("_fn", "inner")
"""Functions of torch between an operator and ``__torch_dispatch__``."""
LSTM_LAYER = torch.ops.aten.mkldnn_rnn_layer.default
"""An LSTM's layer on a CPU. What it returns on shapes alone has no workspace."""
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default)
INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)
PART_OF_PHASE = {"start": "weights", "data": "batch", "forward": "activations", "backward": "activations"}
"""Part of what a phase of the heartbeat allocates, where nothing says otherwise."""


class Work(NamedTuple):
    """One kind of operator call: what it computes and moves, of tensors of one shape."""

    phase: str
    last: bool
    """Whether it is of the last micro-batch of the step, after which gradients are complete."""
    name: str
    dtype: torch.dtype
    flops: float
    nbytes: int
    """Read and written."""


@dataclass(frozen=True)
class Collective:
    """A collective of DeepSpeed's or ours: its name in torch, the bytes of its whole tensor, and the phase."""

    phase: str
    last: bool
    """See ``Work.last``."""
    name: str
    nbytes: int


class DryMode(TorchDispatchMode):
    """While it is active, see the module; ``log`` has the allocations, ``work`` and ``collectives`` what was done."""

    def __init__(self, gloo: bool) -> None:
        """``gloo``: the collectives are gloo's, which are NCCL's otherwise."""
        super().__init__()
        self.gloo = gloo
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.log = AllocationLog()
        self.phase, self.last = "start", True
        self.work: Counter[Work] = Counter()
        self.collectives: list[Collective] = []
        self._part: str | None = None

    def enter(self, phase: str, last: bool) -> None:
        """Begin a phase of the heartbeat, of the ``last`` micro-batch of a step or of one before."""
        self.phase, self.last = phase, last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; called by torch."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        faked = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if func in READS and faked:
            return _nothing(args[0], func)
        if func.namespace == "c10d":
            self._note_collective(func, inputs)
        if func is LOSS and dispatch.implementation(args[0]) is torch_ops:
            return self._run_in_the_open(linear_cross_entropy_forward._init_fn, args, kwargs)
        if func is torch.ops.trireme.scaled.default:
            return args[0]  # on real tensors it is done in place
        if faked and _in_place(func) and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            return args[0]
        if faked and self.phase == "backward" and _is_sum_of_gradients(func, args):
            return args[0]
        if faked and func in INDEXED:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        outputs = self._run(func, args, kwargs, faked or not inputs)
        if func is LSTM_LAYER and faked:
            with self.fake:
                outputs = (*outputs[:3], torch.empty(_bytes_of_workspace(args), dtype=torch.uint8))
        if not (faked or inputs or _has_floats(outputs)):
            outputs = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.device.type != "meta"]
        if results:
            part = self._part_now()
            for result in results:
                self.log.see(result, part)
            self._count(func, (args, kwargs, outputs), [*inputs, *results])
        return outputs

    def _run(self, func: Any, args: Any, kwargs: Any, on_shapes: bool) -> Any:
        if on_shapes:
            with self.fake:
                return func(*args, **kwargs)
        outputs = func(*args, **kwargs)
        return outputs if _in_place(func) else tree_map_only(Tensor, self._without_floats, outputs)

    def _run_in_the_open(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the body of an operator, whose own fake hides what it allocates between its inputs and its outputs."""
        before, self._part = self._part, "logits"
        try:
            with self:
                return function(*args, **kwargs)
        finally:
            self._part = before

    def _without_floats(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself where it is small or whole numbers, else one of its shape with nothing in it."""
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.device.type != "meta":
            with self.fake:
                return torch.empty_like(tensor)
        return tensor

    def _part_now(self) -> str:
        """The part of what is allocated now: by the phase, and by who of DeepSpeed's files asks for it."""
        if self._part:
            return self._part
        if self.phase in ("start", "forward", "backward", "step"):
            owner = _owner()
            if owner.endswith(GATHERS):
                return "gathered weights" if self.phase != "start" else "weights"
            if self.phase == "backward" and "/zero/" in owner:
                return "buckets"
        return PART_OF_PHASE.get(self.phase, "update")

    def _count(self, func: Any, call: tuple[Any, Any, Any], tensors: Sequence[Tensor]) -> None:
        args, kwargs, outputs = call
        if func.is_view or func.namespace == "c10d":
            return
        formula = flop_registry.get(func.overloadpacket)
        flops = _custom_flops(func, args) if formula is None else formula(*args, **kwargs, out_val=outputs)
        distinct = {id(tensor): tensor for tensor in tensors}.values()
        nbytes = sum(tensor.numel() * tensor.itemsize for tensor in distinct)
        self.work[
            Work(self.phase, self.last, func.overloadpacket.__name__, tensors[-1].dtype, float(flops), nbytes)
        ] += 1
        if hidden := _workspace(func, args):
            self.log.pass_by(hidden, "logits" if func is LOSS else self._part_now())

    def _note_collective(self, func: Any, inputs: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() * tensor.itemsize for tensor in inputs]
        name, nbytes = func.overloadpacket.__name__, max(sizes, default=0)
        self.collectives.append(Collective(self.phase, self.last, name, nbytes))
        if self.gloo and "reduce_scatter" in name:  # it reduces a copy of all, and cuts this rank's part out of it
            self.log.pass_by(nbytes, "buckets")


def _nothing(tensor: Tensor, func: Any) -> bool | int | float:
    if func is torch.ops.aten.equal.default:
        return True
    if func is torch.ops.aten.is_nonzero.default or tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.is_floating_point() else 0


def _as_numbers(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices in which each mask is replaced by the numbers of what it chooses: shapes then depend on shapes alone."""
    numbers: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        numbers += index.nonzero().unbind(1) if index is not None and masks else [index]
    return numbers


def _has_floats(outputs: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(outputs))


def _in_place(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _is_sum_of_gradients(func: Any, args: Sequence[Any]) -> bool:
    """Whether autograd itself adds a gradient to one that another use of the same tensor had.

    It does so in place where nobody else has the memory, but not with tensors of subclasses, such as a dry run's.
    """
    if func is not torch.ops.aten.add.Tensor or len(args) != 2 or not isinstance(args[1], Tensor):
        return False
    caller = sys._getframe(2)
    while caller.f_code.co_name in DISPATCH and caller.f_back is not None:
        caller = caller.f_back
    alike = args[0].shape == args[1].shape and args[0].dtype == args[1].dtype
    storage = args[0].untyped_storage()
    alone = torch._C._storage_Use_Count(storage._cdata) == 2  # the tensor's reference, and the one here
    return alike and alone and caller.f_code.co_name == "_engine_run_backward"


def _bytes_of_workspace(args: Sequence[Any]) -> int:
    """Bytes that oneDNN's LSTM keeps for its backward pass: its own affair, so it is asked by a call on zeros."""
    with _disable_current_modes():
        zeros = tree_map_only(Tensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), list(args))
        return int(LSTM_LAYER(*zeros)[3].numel())


def _owner() -> str:
    """The file of the nearest function outside torch and the dry run that is running: whose call this is."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if TORCH_ROOM not in file and not file.startswith(OURS):
            return file
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _custom_flops(func: Any, args: Sequence[Any]) -> float:
    """FLOPs of the operators that torch counts none for: those of attention on a CPU, and of our own kernels."""
    name = func.overloadpacket.__name__
    if func is LOSS:
        return 2.0 * (1 + args[6] + args[7]) * args[0].numel() * args[1].shape[0]
    if "attention" not in name:
        return 0.0
    products = 2 if "backward" not in name else 5
    if func.namespace == "trireme":  # (B, T, H, Dh); causal: the kernels leave out what is hidden
        (rows, queries, heads, size), keys = args[0].shape, args[1].shape[1]
        share = 0.5 if args[9] == 0 else 1.0
        return 2.0 * products * rows * heads * queries * keys * size * share
    q, k = (args[0], args[1]) if products == 2 else (args[1], args[2])  # (B, H, T, Dh)
    return 2.0 * products * math.prod(q.shape) * k.shape[2]


def _workspace(func: Any, args: Sequence[Any]) -> int:
    """Bytes that one of our kernels allocates and frees inside a call: logits of a chunk, rotated queries and keys."""
    name = func.overloadpacket.__name__
    if func is LOSS:
        tokens, rows = args[0].shape[0], args[1].shape[0]
        return 4 * tokens + tokens_per_chunk(tokens) * rows * args[0].itemsize
    if func.namespace != "trireme" or not name.startswith("attention"):
        return 0
    q, k, rotates = args[0], args[1], args[6] is not None
    nbytes = k.numel() * k.itemsize if rotates else 0
    if name == "attention_backward":
        nbytes += 4 * q.numel() // q.shape[-1] + (q.numel() * q.itemsize if rotates else 0)
    return nbytes
