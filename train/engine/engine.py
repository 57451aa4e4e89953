"""Trains one rank's share of an objective with DeepSpeed; its state is stage-independent shards."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.batch import Batch, Losses, StepResult
from train.config.schema import Config
from train.distributed import heartbeat
from train.distributed.param_shard import MASTER, ParamShard, frozen_shards, row_shards
from train.distributed.process_group import DistContext, broadcast_
from train.engine import ds_patches, zero_layout
from train.engine.ds_config import EngineInventory, deepspeed_config
from train.engine.zero_layout import MasterWeights
from train.models.carried_state import carried_states
from train.models.generation_api import Generative
from train.models.initial_weights import ReadWeights
from train.optim.muon import Muon

ds_patches.import_deepspeed()

import deepspeed  # noqa: E402  after its settings


class Engine:
    """One rank's DeepSpeed engine: an objective (nn.Module returning Losses) and its optimizer under ZeRO 0 to 3."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        world: DistContext,
        micro: int,
        accumulation: int,
    ) -> None:
        """``micro`` rows per forward pass, ``accumulation`` forward passes per optimizer step, both at most.

        The parameters are those of ``allocate_parameters``, and remain without weights until ``fill`` or ``load``.
        """
        self.rank, self.world_size = world.rank, world.size
        self.clip = config.optimizer.clip
        self.memories = carried_states(objective)
        self.shapes = {name: p.shape for name, p in [*objective.named_parameters(), *objective.named_buffers()]}
        self.names: dict[Any, str] = {p: name for name, p in objective.named_parameters() if p.requires_grad}
        self.masters = MasterWeights.of(config.zero.stage, config.precision.name)
        kept_by = (world.rank, world.size) if config.zero.stage else (0, 1)
        self.frozen = frozen_shards(objective, *kept_by, own=self.masters is MasterWeights.MODULE)
        os.environ["LOCAL_RANK"] = str(
            world.device.index or 0
        )  # index of the device, which is not always the rank's index on its host
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        inventory = EngineInventory(world.device.type, world.size, sum(p.numel() for p in self.names))
        settings = deepspeed_config(config, micro, accumulation, inventory, plain=self.masters is MasterWeights.MODULE)
        _patch_collectives(world.size)
        with ds_patches.weights_come_later():
            self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
        self.inner: torch.optim.Optimizer = self.engine.basic_optimizer
        if self.masters is MasterWeights.MODULE:  # a lone rank has nothing to average, yet would copy every gradient
            self.engine.enable_backward_allreduce = world.size > 1
        self.trained = list(zero_layout.trained_shards(self.engine, self.masters, self.names, world.rank))
        self.param_shards = [*self.trained, *self.frozen]
        if isinstance(self.inner, Muon):
            self.inner.dtype = torch.bfloat16 if config.precision.name == "bf16" else torch.float32
            if config.zero.stage > 0:
                self.inner.shards = zero_layout.shards_by_flat(self.engine, self.names, self.trained, self.shapes)
                self.inner.world = world
        self.on_progress: Callable[[float], None] = lambda share: None
        """Called with the share of this rank's state that is there, while ``fill`` or ``load`` goes on."""
        self.carried: list[ParamShard] = []
        for name, rows in objective.named_buffers():
            self.carried += row_shards(name, rows, world)

    # ------------------------------------------------------------------------------------------------------- training

    def train_step(
        self, micro_batches: Sequence[Batch], counts: dict[str, int], lr: float, before_update: Callable[[], None]
    ) -> StepResult:
        """Forward, backward and update over this rank's micro-batches.

        ``counts`` are the trained tokens of the global batch, per loss: each loss is a sum divided by its count.
        DeepSpeed averages gradients over ranks, so the sum over ranks is restored by the factor ``world_size``. Master
        weights and moments change only after ``before_update()`` has returned.
        """
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if not self.engine.module.training:  # train() walks all modules
            self.engine.train()
        # DeepSpeed 0.19 divides the gradients of its unfused optimizer by the loss scale, yet never scales the loss.
        scale = float(self._scaler().cur_scale) if self.masters is MasterWeights.UNFUSED else 1.0
        totals: dict[str, tuple[Tensor, Tensor]] = {}
        norm: float | Tensor = math.nan
        applied = True
        for n, batch in enumerate(micro_batches):
            heartbeat.enter_phase("forward", n)
            self.engine.set_gradient_accumulation_boundary(n == len(micro_batches) - 1)  # a ramp has fewer at first
            losses = self.engine(batch)
            trained = {name: total for name, (total, _) in losses.items() if name in counts}  # others are told only
            loss = torch.stack([s * (self.world_size / max(counts[k], 1)) for k, s in trained.items()]).sum()
            heartbeat.enter_phase("backward", n)
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            for name, (total, count) in losses.items():
                before = totals.get(name, (torch.zeros_like(total), torch.zeros_like(count)))
                totals[name] = (before[0] + total.detach(), before[1] + count)
            heartbeat.enter_phase("step", n)
            if n == len(micro_batches) - 1:
                sums = [number.double() for pair in totals.values() for number in pair]
                if self.masters is MasterWeights.MODULE:
                    norm, applied, read_sums = self._clip_module_gradients(sums)
                else:
                    read_sums = read_later(torch.stack(sums))
                before_update()
            self.engine.step()
        if self.masters is not MasterWeights.MODULE:
            applied = not getattr(self.engine.optimizer, "overflow", False)
            norm = self._zero_gradient_norm(scale) if applied else math.nan
        for memory in self.memories:
            memory.commit(applied)
        read = iter(read_sums())
        return StepResult({name: (next(read), next(read)) for name in totals}, norm, applied)

    def _clip_module_gradients(self, sums: Sequence[Tensor]) -> tuple[float, bool, Callable[[], list[float]]]:
        """Clip gradients by their global norm as ZeRO does, or drop them all if it is not finite: (norm, kept, sums).

        Adam would keep one NaN element in its moments for ever, so the norm is checked before the update. The host
        waits for the device once: the step's ``sums`` are read with the norm.
        """
        grads = [p.grad for p in self.names if p.grad is not None]
        *read, norm = torch.stack([*sums, torch.nn.utils.get_total_norm(grads).double()]).tolist()
        if not math.isfinite(norm):
            self.engine.module.zero_grad(set_to_none=True)
            return math.nan, False, lambda: read
        if 0 < self.clip < norm + 1e-6:
            torch._foreach_div_(grads, (norm + 1e-6) / self.clip)
        return norm, True, lambda: read

    def _zero_gradient_norm(self, scale: float) -> float | Tensor:
        """The norm of the gradients that DeepSpeed clipped, where it was computed; 0 where it keeps none."""
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else norm / scale

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        """Losses of one micro-batch, without training."""
        self.engine.eval()
        losses: Losses = self.engine(batch)
        return losses

    def generative(self) -> Generative | None:
        """The objective, in eval mode, for the text that rank 0 generates; None where it cannot, and on ranks that are
        not needed.

        Where weights are sharded (stage 3) all ranks are, and make the same calls, since all gather them together: the
        logits of rank 0 are those of every rank, so that a rounding error on one cannot part them.
        """
        module: Any = self.engine.module
        if not isinstance(module, Generative) or not (self.rank == 0 or self._shards_weights):
            return None
        self.engine.eval()
        return ShardedGenerative(module) if self._shards_weights else module

    # ---------------------------------------------------------------------------------------------------------- state

    def states(self, shard: ParamShard) -> dict[str, Tensor]:
        """This rank's views of a shard: fp32 master weights under MASTER, and the optimizer's moments by name."""
        views = {MASTER: shard.view_of(shard.holder)}
        for kind, value in self.inner.state.get(shard.holder, {}).items():
            if isinstance(value, Tensor) and value.numel() == shard.holder.numel() and kind != "step":
                views[kind] = shard.view_of(value)
        return views

    def fill(self, read: ReadWeights) -> None:
        """Give every parameter its first weights. There are no moments then: the optimizer makes them as it needs them.

        Under ZeRO 1 to 3 masters are filled in fp32, and the weights in the run's precision are made from them.
        """
        carried = {shard.name for shard in self.carried}

        def first(shard: ParamShard, kind: str) -> Tensor:
            return torch.zeros(()) if shard.name in carried else read(shard.name, shard.start, shard.numel)

        self.load(first, dict.fromkeys(self.shapes, (MASTER,)), updates=0)

    def load(
        self, read: Callable[[ParamShard, str], Tensor], kinds: Mapping[str, Collection[str]], updates: int
    ) -> None:
        """Fill every shard from ``read(shard, kind)`` for its parameter's ``kinds``; ``updates`` is Adam's step."""
        self.inner.state.clear()  # DeepSpeed's unfused optimizer makes a step of zero gradients to create it
        for holder, name in {id(p.holder): (p.holder, p.name) for p in self.trained}.values():
            moments: dict[str, Any] = {k: torch.zeros_like(holder.detach()) for k in kinds[name] if k != MASTER}
            if moments:  # optimizers that count updates read "step", the others ignore it
                device = holder.device if self.inner.param_groups[0].get("fused") else torch.device("cpu")
                moments["step"] = torch.tensor(float(updates), dtype=torch.float32, device=device)
                self.inner.state[holder] = moments
        done, total = 0, max(1, sum(shard.numel for shard in self.param_shards))
        for shard in [*self.param_shards, *self.carried]:
            for kind, view in self.states(shard).items():
                heartbeat.touch()  # a large model takes minutes
                view.copy_(read(shard, kind))
            done += shard.numel
            self.on_progress(min(1.0, done / total))
        self._fill_frozen(read)
        zero_layout.copy_masters_to_weights(self.engine, self.masters)

    @torch.no_grad()
    def _fill_frozen(self, read: Callable[[ParamShard, str], Tensor]) -> None:
        """Fill the frozen weights that the forward pass uses: no optimizer has a master copy to make them from."""
        held = {shard.name: shard for shard in self.frozen}
        for name, param in self.engine.module.named_parameters():
            if param.requires_grad:
                continue
            if self._shards_weights:
                if name in held:  # ZeRO cuts a parameter into the same shares
                    param.ds_tensor.narrow(0, 0, held[name].numel).copy_(held[name].holder)
                param.ds_secondary_tensor = None  # a copy of what was
            elif self.replicated:
                param.copy_(held[name].holder.view_as(param))
            else:
                param.copy_(read(ParamShard(name, 0, param.numel(), param, 0), MASTER).view_as(param))

    def scalars(self) -> dict[str, float]:
        """Optimizer state beside tensors: the dynamic loss scale of fp16; empty for other precisions."""
        scaler = self._scaler()
        return {k: float(getattr(scaler, k)) for k in _SCALER_STATE if getattr(scaler, k, None) is not None}

    def load_scalars(self, values: dict[str, float]) -> None:
        """Restore what ``scalars`` returned, where this precision has it."""
        scaler = self._scaler()
        for key, value in values.items():
            if getattr(scaler, key, None) is not None:
                setattr(scaler, key, type(getattr(scaler, key))(value))

    def _scaler(self) -> Any:
        optimizer = self.engine.optimizer
        unfused = self.masters is MasterWeights.UNFUSED
        return optimizer.loss_scale_config if unfused else getattr(optimizer, "loss_scaler", None)

    @property
    def module(self) -> nn.Module:
        """The objective that is trained."""
        return self.engine.module

    def gathered(self, param: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """Context in which a parameter is whole, to be read. A collective."""
        if not self._shards_weights:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters([param])

    @property
    def _shards_weights(self) -> bool:
        return bool(self.engine.zero_optimization_stage() == 3)

    @property
    def evenly_sharded(self) -> bool:
        """Whether each rank holds an equal part of every parameter (ZeRO stage 3)."""
        return self._shards_weights

    @property
    def replicated(self) -> bool:
        """Whether every rank holds every shard (ZeRO stage 0)."""
        return self.masters is not MasterWeights.ZERO


class ShardedGenerative:
    """A generative objective under ZeRO-3, called by all ranks together; see ``generation_api.Generative``."""

    def __init__(self, module: Generative) -> None:
        self.module = module
        self.max_len, self.continues = module.max_len, module.continues
        self.parameters = module.parameters

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Read the prompts: logits of rank 0, and this rank's state."""
        return self._same(*self.module.prefill(tokens, lengths, capacity))

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one more token per row: logits of rank 0, and this rank's state."""
        return self._same(*self.module.decode(token, state))

    def _same(self, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits = logits.float().contiguous()
        broadcast_(logits, 0)
        return logits, state


def read_later(numbers: Tensor) -> Callable[[], list[float]]:
    """Start to copy numbers to the host; the result waits for them, and for nothing that is queued after them."""
    copy = numbers.to("cpu", non_blocking=True)
    if not numbers.is_cuda:
        return copy.tolist
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "barrier",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


def _patch_collectives(world_size: int) -> None:
    """Count DeepSpeed's collectives in the rank's heartbeat, as ``train.distributed.process_group`` does its own.

    The sum over a lone rank is there already, yet DeepSpeed asks for one up to four times a step, each a change of
    threads; it ignores what all_reduce returns.
    """
    deepspeed.init_distributed(dist_init_required=False)
    backend = deepspeed.comm.comm.cdb
    for name in _COLLECTIVES:
        setattr(backend, name, heartbeat.count_calls(getattr(type(backend), name).__get__(backend), name))
    if world_size == 1:
        backend.all_reduce = lambda *args, **options: None


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
