"""What a step costs beside its arithmetic: its collectives, and how often the host waits for the device's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import gloo_ranks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import load as configuration


class CountScalars(TorchDispatchMode):
    """Counts conversions of floating-point tensors to Python numbers, also those inside of torch's own functions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_local_scalar_dense" and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


class CountLists(TorchFunctionMode):
    """Counts conversions of floating-point tensors to lists, which torch does not dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "tolist" and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


def counted(world, emit, config, corpus) -> list[tuple[bool, int, int]]:
    """Of each step after the first: whether it is logged, its collectives outside DeepSpeed, and the host's reads of
    floating-point tensors, its own collectives' left out.
    """
    from train import loop
    from train.distributed import process_group

    make_step, all_reduce, rows, calls = loop.make_step, process_group.all_reduce_sum, [], []

    def reduce(values):
        calls.append(values)
        return all_reduce(values)

    def counting(run, state, *rest):
        calls.clear()
        with CountScalars() as scalars, CountLists() as lists:
            made = make_step(run, state, *rest)
        reads = scalars.count + lists.count - len(calls)  # the sums are on the host
        rows.append((bool(made[1]), len(calls), reads))
        return made

    loop.make_step, process_group.all_reduce_sum = counting, reduce
    gloo_ranks.train(world, emit, config, corpus)
    return rows[1:]


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_step_makes_one_collective_and_few_reads(make, corpus: Path, zero: str):
    config = make(f"zero={zero}", "cluster.workers=2", "log_every=2", "eval_every=0", "save_every=0")
    for rows in gloo_ranks.run(2, counted, configuration.to_dict(config), str(corpus)):
        assert {row[0] for row in rows} == {True, False}
        for logged, collectives, read in rows:
            assert collectives == 1
            assert read <= 1 + logged, "the sums of the step; the norm where it is logged"
