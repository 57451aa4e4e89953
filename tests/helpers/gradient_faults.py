"""Faults of training, planted in a rank by changing what the loop and the engine really do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from train.batch import IGNORE, count_targets

Batches = list[dict[str, Tensor]]


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces a function by ``change(original, *arguments)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: change(original, *arguments, **options))


def in_step(change: Callable[[Any, Batches, dict[str, int]], None]) -> None:
    """Calls ``change(engine, batches, counts)`` on copies of what ``Engine.train_step`` is given, before it runs."""
    from train.engine.engine import Engine

    def step(original: Any, engine: Any, batches: Any, counts: Any, *rest: Any) -> Any:
        batches, counts = copy.deepcopy(batches), dict(counts)
        change(engine, batches, counts)
        return original(engine, batches, counts, *rest)

    wrap(Engine, "train_step", step)


def on_rank(rank: int, change: Callable[[Batches], None]) -> None:
    """As ``in_step``, on one rank."""

    def changed(engine: Any, batches: Batches, counts: dict[str, int]) -> None:
        if engine.rank == rank:
            change(batches)

    in_step(changed)


def before_optimizer(change: Callable[[Any, list[Tensor]], None]) -> None:
    """Calls ``change(engine, gradients)`` on what the optimizer is about to be given, in every step."""
    from train.engine import gradient_check

    original = gradient_check.captured_gradients

    @contextmanager
    def captured(engine: Any) -> Any:
        with original(engine) as gradients:
            keep = engine.inner.step

            def step() -> None:
                change(engine, [p.grad for g in engine.inner.param_groups for p in g["params"] if p.grad is not None])
                keep()

            engine.inner.step = step
            yield gradients

    gradient_check.captured_gradients = captured


# --------------------------------------------------------------------------------------------------------------- counts


def count_is_one_too_high() -> None:
    in_step(lambda engine, batches, counts: counts.update(loss=counts["loss"] + 1))


def counts_are_doubled() -> None:
    in_step(lambda engine, batches, counts: counts.update(loss=2 * counts["loss"]))


def count_is_the_ranks_own() -> None:
    in_step(lambda engine, batches, counts: counts.update(loss=sum(count_targets(b)["loss"] for b in batches)))


def padding_is_counted() -> None:
    in_step(lambda engine, batches, counts: counts.update(loss=2 * sum(b["targets"].numel() for b in batches) + 1))


def loss_is_a_mean_of_means() -> None:
    """Each micro-batch is divided by its own count, and all weigh the same."""
    from train.data import loader
    from train.engine.engine import deepspeed

    whole: dict[str, int] = {}

    def forward(original: Any, engine: Any, batch: Any) -> Any:
        share = whole["loss"] / 4 / count_targets(batch)["loss"]
        return {name: (total * share, count) for name, (total, count) in original(engine, batch).items()}

    in_step(lambda engine, batches, counts: whole.update(counts))
    wrap(deepspeed.DeepSpeedEngine, "forward", forward)
    wrap(loader.Loader, "_micro_batches", _uneven)


def _uneven(original: Any, *arguments: Any) -> Any:
    """Batches the first of which has fewer targets: a fault of means shows where counts differ."""
    batches = original(*arguments)
    batches[0]["targets"][0, 1:] = IGNORE
    return batches


# ------------------------------------------------------------------------------------------------------------ the rows


def rank_is_left_out() -> None:
    def drop(batches: Batches) -> None:
        for batch in batches:
            batch["targets"].fill_(IGNORE)

    on_rank(1, drop)


def micro_batch_is_left_out() -> None:
    def drop(batches: Batches) -> None:
        batches[0]["targets"].fill_(IGNORE)

    on_rank(0, drop)


def micro_batch_comes_twice() -> None:
    on_rank(0, lambda batches: batches[1].update(batches[0]))


def ranks_read_the_same_rows() -> None:
    from train.data import loader
    from train.engine import gradient_check

    share = loader.RankShare
    loader.RankShare = lambda rank, size, micro: share(0, size, micro)
    gradient_check.RankShare = share


def token_is_left_out() -> None:
    def drop(batches: Batches) -> None:
        row, column = (batches[0]["targets"] != IGNORE).nonzero()[0]
        batches[0]["targets"][row, column] = IGNORE

    on_rank(1, drop)


def mask_is_shifted_by_one() -> None:
    def shift(engine: Any, batches: Batches, counts: dict[str, int]) -> None:
        for batch in batches:
            batch["targets"].copy_(batch["targets"].roll(1, dims=1))

    in_step(shift)


def last_target_is_trained_twice() -> None:
    """A target that stands in two rows of its rank is counted in both."""

    def repeat(batches: Batches) -> None:
        batches[0]["targets"][1] = batches[0]["targets"][0]

    on_rank(0, repeat)


def documents_see_each_other() -> None:
    def merge(engine: Any, batches: Batches, counts: dict[str, int]) -> None:
        for batch in batches:
            batch["segments"].clamp_(max=1)

    in_step(merge)


def positions_do_not_restart() -> None:
    def number(engine: Any, batches: Batches, counts: dict[str, int]) -> None:
        for batch in batches:
            batch["positions"].copy_(torch.arange(batch["positions"].shape[1]))

    in_step(number)


# ----------------------------------------------------------------------------------------------------------- the engine


def accumulation_divides_again() -> None:
    from train.engine.engine import deepspeed

    def backward(original: Any, engine: Any, loss: Tensor, **options: Any) -> Any:
        return original(engine, loss / engine.gradient_accumulation_steps(), **options)

    wrap(deepspeed.DeepSpeedEngine, "backward", backward)


def factor_of_the_world_is_missing() -> None:
    in_step(lambda engine, batches, counts: setattr(engine, "world_size", 1))


def regulariser_is_left_out() -> None:
    def drop(engine: Any, batches: Batches, counts: dict[str, int]) -> None:
        engine.engine.module.head.regularisers = {}

    in_step(drop)


def _scale_clip(factor: float) -> None:
    def change(engine: Any, batches: Batches, counts: dict[str, int]) -> None:
        engine.clip *= factor
        if hasattr(engine.engine.optimizer, "clip_grad"):
            engine.engine.optimizer.clip_grad *= factor

    in_step(change)


def norm_is_skipped() -> None:
    _scale_clip(0.0)


def clipping_is_too_strict() -> None:
    _scale_clip(0.9)


def norm_is_the_ranks_own() -> None:
    """What clips is the norm of half of the gradient."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    from train.engine.engine import Engine

    def clip(original: Any, zero: Any, grads: Any, norm: Any) -> Any:
        return original(zero, grads, norm / 2**0.5)

    def clip_module(original: Any, engine: Any, sums: Any) -> Any:
        engine.clip *= 2**0.5
        return original(engine, sums)

    wrap(Engine, "_clip_module_gradients", clip_module)
    wrap(stage_1_and_2.DeepSpeedZeroOptimizer, "unscale_and_clip_grads", clip)
    wrap(stage3.DeepSpeedZeroOptimizer_Stage3, "unscale_and_clip_grads", clip)


def gradients_are_not_reduced() -> None:
    """What a rank adds is half of what it keeps: the other rank's gradients do not arrive."""
    import torch.distributed as dist

    def local(original: Any, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        mine = tensor.clone()
        work = original(tensor, *arguments, **options)
        if tensor.is_floating_point() and tensor.dtype is torch.float32 and tensor.numel() > 1:
            tensor.copy_(mine)
        return work

    def scatter(original: Any, output: Tensor, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        work = original(output, tensor, *arguments, **options)
        output.copy_(tensor.view(-1)[dist.get_rank() * output.numel() :][: output.numel()].view_as(output))
        return work

    wrap(dist, "all_reduce", local)
    wrap(dist, "reduce", local)
    wrap(dist, "reduce_scatter_tensor", scatter)


# ------------------------------------------------------------------------------------ between the engine and its update


def bucket_is_reordered() -> None:
    def swap(engine: Any, grads: list[Tensor]) -> None:
        flat = max(grads, key=torch.Tensor.numel).view(-1)
        half = len(flat) // 2
        flat[: 2 * half] = torch.cat([flat[half : 2 * half], flat[:half]])

    before_optimizer(swap)


def shards_are_shifted_by_one() -> None:
    def shift(engine: Any, grads: list[Tensor]) -> None:
        for grad in grads:
            grad.view(-1).copy_(grad.view(-1).roll(1))

    before_optimizer(shift)


def element_is_lost() -> None:
    def zero(engine: Any, grads: list[Tensor]) -> None:
        flat = max(grads, key=torch.Tensor.numel).view(-1)
        flat[flat.abs().argmax()] = 0

    before_optimizer(zero)


def sums_have_eight_bits() -> None:
    def cut(engine: Any, grads: list[Tensor]) -> None:
        for grad in grads:
            grad.copy_(grad.bfloat16())

    before_optimizer(cut)


def parameter_has_no_gradient() -> None:
    def zero(engine: Any, grads: list[Tensor]) -> None:
        for shard in engine.trained:
            if shard.name.endswith("norm.weight") and shard.holder.grad is not None:
                shard.view_of(shard.holder.grad).zero_()

    before_optimizer(zero)


def sign_is_turned() -> None:
    def turn(engine: Any, grads: list[Tensor]) -> None:
        shard = next(s for s in engine.trained if s.holder.grad is not None)
        shard.view_of(shard.holder.grad).neg_()

    before_optimizer(turn)


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        count_is_one_too_high,
        counts_are_doubled,
        count_is_the_ranks_own,
        padding_is_counted,
        loss_is_a_mean_of_means,
        rank_is_left_out,
        micro_batch_is_left_out,
        micro_batch_comes_twice,
        ranks_read_the_same_rows,
        token_is_left_out,
        mask_is_shifted_by_one,
        last_target_is_trained_twice,
        documents_see_each_other,
        positions_do_not_restart,
        accumulation_divides_again,
        factor_of_the_world_is_missing,
        regulariser_is_left_out,
        norm_is_skipped,
        clipping_is_too_strict,
        norm_is_the_ranks_own,
        gradients_are_not_reduced,
        bucket_is_reordered,
        shards_are_shifted_by_one,
        element_is_lost,
        sums_have_eight_bits,
        parameter_has_no_gradient,
        sign_is_turned,
    )
}
