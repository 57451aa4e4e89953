"""DeepSpeed, whole, behind one class: the only file that knows it.

The engine trains an objective (an nn.Module that returns Losses) under ZeRO 0-3, and shows its state as pieces (``train.distributed.param_shard``),
wherever the stage happens to keep them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

if not torch.backends.cuda.is_built():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns, on every start, that it found nothing else
import deepspeed

# Loaded by the first optimizer and by ZeRO itself, seconds later; here they are paid for once, before a warm process forks.
import deepspeed.module_inject.auto_ep_layer
import torch._dynamo
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor, nn

from train.batch import Batch, Losses, StepResult
from train.config.schema import Config
from train.distributed import heartbeat
from train.distributed.param_shard import MASTER, ParamShard, frozen_shards, row_shards
from train.distributed.process_group import DistContext
from train.engine.ds_config import deepspeed_config
from train.models.carried_state import carried_states
from train.optim.muon import Muon

# DeepSpeed probes for a compiler, then builds a shared-memory reduction that only inference uses. Neither is wanted here.
vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)
# Its Muon, which ZeRO loads and we do not use, is given to torch's compiler as it is imported, which loads all of that: a second.
_before = os.environ.get("TORCHDYNAMO_DISABLE", "0")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402  under this setting alone

os.environ["TORCHDYNAMO_DISABLE"] = _before


class Engine:
    """One rank's share of the model and its optimizer."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        world: DistContext,
        micro: int,
        accumulation: int,
    ) -> None:
        """``micro`` rows a forward pass, ``accumulation`` forward passes an optimizer step."""
        self.rank, self.world_size = world.rank, world.size
        self.clip = config.optimizer.clip
        self.memories = carried_states(objective)
        self.shapes = {name: p.shape for name, p in [*objective.named_parameters(), *objective.named_buffers()]}
        self.names: dict[Any, str] = {p: name for name, p in objective.named_parameters() if p.requires_grad}
        frozen = frozen_shards(objective, *((world.rank, world.size) if config.zero.stage else (0, 1)))
        self.plain = config.zero.stage == 0 and config.precision.name == "fp32"
        os.environ["LOCAL_RANK"] = str(world.device.index or 0)  # the device, not the rank's place on its host
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        settings = deepspeed_config(config, micro, accumulation, plain=self.plain)
        self.unfused = config.zero.stage == 0 and not self.plain
        initial = [p.detach().float().clone() for p in self.names] if self.unfused else []
        _count_collectives()
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
        self.inner: torch.optim.Optimizer = self.engine.basic_optimizer
        if self.plain:  # alone, there is nothing to average, yet every gradient would be copied there and back
            self.engine.enable_backward_allreduce = world.size > 1
        self.trained = list(self._pieces())
        self.param_shards = [*self.trained, *frozen]
        if isinstance(self.inner, Muon) and config.zero.stage > 0:
            self.inner.shards, self.inner.world = self._shards(), world
        if initial:  # DeepSpeed's unfused optimizer takes a step of zero gradients to make its states: undo it
            torch._foreach_copy_([p.holder.detach() for p in self.trained], initial)
            self.inner.state.clear()
            self._spread_masters()
        self.carried = [piece for name, rows in objective.named_buffers() for piece in row_shards(name, rows, world)]

    # ------------------------------------------------------------------------------------------------------- training

    def train_step(
        self, micro_batches: Sequence[Batch], counts: dict[str, int], lr: float, before_update: Callable[[], None]
    ) -> StepResult:
        """Forward, backward and update over this rank's micro-batches.

        ``counts`` are the trained places of the global batch, per loss: each loss is a sum divided by its count. DeepSpeed
        averages gradients over ranks, so the sum over ranks is restored by the factor ``world_size``. Master weights and
        moments change only after ``before_update()`` has returned.
        """
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if not self.engine.module.training:  # it walks all modules
            self.engine.train()
        # DeepSpeed 0.19 divides the gradients of its unfused optimizer by the loss scale, yet never scales the loss.
        scale = float(self.engine.optimizer.loss_scale_config.cur_scale) if self.unfused else 1.0
        totals: dict[str, tuple[Tensor, Tensor]] = {}
        norm, applied = math.nan, True
        for n, batch in enumerate(micro_batches):
            heartbeat.enter_phase("forward", n)
            losses = self.engine(batch)
            loss = torch.stack([s * (self.world_size / max(counts[k], 1)) for k, (s, _) in losses.items()]).sum()
            heartbeat.enter_phase("backward", n)
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            for name, (total, count) in losses.items():
                before = totals.get(name, (torch.zeros_like(total), torch.zeros_like(count)))
                totals[name] = (before[0] + total.detach(), before[1] + count)
            heartbeat.enter_phase("step", n)
            if n == len(micro_batches) - 1:
                if self.plain:
                    norm, applied = self._clip_plain()
                before_update()
            self.engine.step()
        if not self.plain:
            applied = not getattr(self.engine.optimizer, "overflow", False)
            norm = float(self.engine.get_global_grad_norm() or 0.0) / scale if applied else math.nan
        for memory in self.memories:
            memory.commit(applied)
        return StepResult(totals, norm, applied)

    def _clip_plain(self) -> tuple[float, bool]:
        """Clip as ZeRO does, where there is no ZeRO; drop the gradients altogether if their norm is not finite.

        Adam would carry one NaN element in its moments for ever, so the norm is looked at before the update.
        """
        grads = [p.grad for p in self.names if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not math.isfinite(norm):
            self.engine.module.zero_grad(set_to_none=True)
            return math.nan, False
        if 0 < self.clip < norm + 1e-6:
            torch._foreach_div_(grads, (norm + 1e-6) / self.clip)
        return norm, True

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        """Losses of one micro-batch, nothing trained."""
        self.engine.eval()
        losses: Losses = self.engine(batch)
        return losses

    # ---------------------------------------------------------------------------------------------------------- state

    def states(self, piece: ParamShard) -> dict[str, Tensor]:
        """The kinds of a piece and this rank's views of them: the fp32 master weights and the optimizer's moments."""
        found = {MASTER: piece.view_of(piece.holder)}
        for kind, value in self.inner.state.get(piece.holder, {}).items():
            if isinstance(value, Tensor) and value.numel() == piece.holder.numel() and kind != "step":
                found[kind] = piece.view_of(value)
        return found

    def load(
        self, read: Callable[[ParamShard, str], Tensor], kinds: Mapping[str, Collection[str]], updates: int
    ) -> None:
        """Fill every piece from ``read(piece, kind)``, its parameter's ``kinds``; ``updates`` is how many the moments have seen."""
        self.inner.state.clear()
        for holder, name in {id(p.holder): (p.holder, p.name) for p in self.trained}.values():
            moments: dict[str, Any] = {k: torch.zeros_like(holder.detach()) for k in kinds[name] if k != MASTER}
            if moments:  # the rules that count their updates call the count "step", and the others do not look
                on = holder.device if self.inner.param_groups[0].get("fused") else torch.device("cpu")
                moments["step"] = torch.tensor(float(updates), dtype=torch.float32, device=on)
                self.inner.state[holder] = moments
        for piece in [*self.param_shards, *self.carried]:
            for kind, view in self.states(piece).items():
                view.copy_(read(piece, kind))
        self._spread_masters()
        self._spread_frozen(read)

    @torch.no_grad()
    def _spread_masters(self) -> None:
        """Carry the fp32 masters into the weights that forward uses, in their precision, on every rank."""
        zero, stage = self.engine.optimizer, self.engine.zero_optimization_stage()
        if self.plain:
            return
        if stage == ZeroStageEnum.weights:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero._post_step(set())
        elif stage == ZeroStageEnum.disabled:
            for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                torch._foreach_copy_(list(low), list(high))
        else:
            zero.update_lp_params()

    @torch.no_grad()
    def _spread_frozen(self, read: Callable[[ParamShard, str], Tensor]) -> None:
        """Fill the weights that are not trained, which no optimizer carries anywhere."""
        for name, param in self.engine.module.named_parameters():
            if not param.requires_grad:
                whole = ParamShard(name, 0, self.shapes[name].numel(), param, 0)
                with self._gathered(param, modifier_rank=0):
                    param.copy_(read(whole, MASTER).view(self.shapes[name]))

    def scalars(self) -> dict[str, float]:
        """What else the optimizer remembers: the dynamic loss scale of fp16."""
        scaler = self._scaler()
        return {k: float(getattr(scaler, k)) for k in _SCALER_STATE if getattr(scaler, k, None) is not None}

    def load_scalars(self, values: dict[str, float]) -> None:
        """Set what ``scalars`` gave, where this precision has it."""
        scaler = self._scaler()
        for key, value in values.items():
            if getattr(scaler, key, None) is not None:
                setattr(scaler, key, type(getattr(scaler, key))(value))

    def _scaler(self) -> Any:
        zero = self.engine.optimizer
        return zero.loss_scale_config if self.unfused else getattr(zero, "loss_scaler", None)

    @property
    def module(self) -> nn.Module:
        """The objective that is trained."""
        return self.engine.module

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, in fp32 on the CPU of rank 0, one at a time; other ranks take part and get empty ones.

        A collective: every rank iterates to the end.
        """
        for name, param in self.engine.module.named_parameters():
            with self._gathered(param):
                yield name, param.detach().float().cpu().clone() if self.rank == 0 else torch.empty(0)

    def _gathered(
        self, param: nn.Parameter, modifier_rank: int | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """Inside, a parameter is whole; what ``modifier_rank`` writes to it stays."""
        stage3 = self.engine.zero_optimization_stage() == ZeroStageEnum.weights
        return deepspeed.zero.GatheredParameters([param], modifier_rank) if stage3 else contextlib.nullcontext()

    # --------------------------------------------------------------------------------------- where each stage keeps it

    def _pieces(self) -> Iterator[ParamShard]:
        zero, stage = self.engine.optimizer, self.engine.zero_optimization_stage()
        if stage == ZeroStageEnum.weights:
            yield from self._pieces_of_stage3(zero)
        elif stage == ZeroStageEnum.disabled:
            groups = () if self.plain else zip(zero.fp16_groups, zero.fp32_groups, strict=True)
            masters = {a: b for low, high in groups for a, b in zip(low, high, strict=True)}
            for param, name in self.names.items():
                yield ParamShard(name, 0, param.numel(), masters.get(param, param), 0)
        else:
            for param, name in self.names.items():
                mapping = param._hp_mapping
                if mapping is not None:  # None: another rank holds all of it
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield ParamShard(
                        name, low.start, low.numel, self._flats(zero)[mapping.param_group_index], high.start
                    )

    @staticmethod
    def _flats(zero: Any) -> list[Tensor]:
        """The flat masters of stages 1 and 2, one a group."""
        return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition

    def _pieces_of_stage3(self, zero: Any) -> Iterator[ParamShard]:
        for param, name in self.names.items():
            group, offset, share = zero.grad_position[zero.get_param_id(param)]
            start = self.rank * share
            numel = min(share, param.ds_numel - start)  # the last ranks' shares are padded
            if numel > 0:
                yield ParamShard(name, start, numel, zero.fp32_partitioned_groups_flat[group], offset)

    def _shards(self) -> dict[Tensor, list[tuple[torch.Size, ParamShard]]]:
        """What ``Muon.shards`` is to be: for each flat tensor of masters its parameters, in ZeRO's order, the same on all ranks."""
        zero, mine = self.engine.optimizer, {p.name: p for p in self.trained}
        if self.engine.zero_optimization_stage() == ZeroStageEnum.weights:
            flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
        else:
            flats, groups = self._flats(zero), getattr(zero, "bf16_groups", None) or zero.bit16_groups
        named = [[self.names[param] for param in group] for group in groups]
        empty = {
            name: ParamShard(name, 0, 0, flat, 0) for flat, names in zip(flats, named, strict=True) for name in names
        }
        return {f: [(self.shapes[n], (empty | mine)[n]) for n in names] for f, names in zip(flats, named, strict=True)}

    @property
    def replicated(self) -> bool:
        """Every rank holds every piece: stage 0."""
        return bool(self.engine.zero_optimization_stage() == ZeroStageEnum.disabled)


_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "barrier",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


def _count_collectives() -> None:
    """Mark DeepSpeed's collectives in the rank's pulse, as `train.distributed.process_group` does its own."""
    deepspeed.init_distributed(dist_init_required=False)
    backend = deepspeed.comm.comm.cdb
    for name in _COLLECTIVES:
        setattr(backend, name, heartbeat.count_calls(getattr(type(backend), name).__get__(backend), name))


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
