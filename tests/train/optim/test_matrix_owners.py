"""Whole matrices out of shards and back, on real gloo ranks; and who owns which."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from helpers import gloo_ranks
from hypothesis import given
from hypothesis import strategies as st

from train.distributed.param_shard import ParamShard
from train.distributed.process_group import DistContext
from train.optim.matrix_owners import MatrixOwners, assign_owners

SHAPES = [torch.Size(shape) for shape in [(3, 5), (7, 2), (1, 1), (4, 4)]]


def layout(ranks: int, seed: int) -> list[list[tuple[int, int]]]:
    """By rank and matrix the range that the rank holds: cut at random places, so that some ranks hold nothing."""
    draw, ranges = random.Random(seed), [[] for _ in range(ranks)]
    for shape in SHAPES:
        cuts = [0, *sorted(draw.choice([0, shape.numel(), draw.randint(0, shape.numel())]) for _ in range(ranks - 1))]
        for rank, (start, end) in enumerate(zip(cuts, [*cuts[1:], shape.numel()], strict=True)):
            ranges[rank].append((start, end - start))
    return ranges


def whole_matrix(number: int) -> torch.Tensor:
    """The elements of a matrix, flattened: another value for each element of each matrix."""
    return 100.0 * number + torch.arange(SHAPES[number].numel(), dtype=torch.float32)


def exchanged(world: DistContext, emit: Callable[[dict], None], seeds: int) -> list[dict]:
    """For each layout what this rank collects, and what comes back to it of three times that."""
    results = []
    for seed in range(seeds):
        ranges, matrices, offset = layout(world.size, seed)[world.rank], [], 0
        for number, (start, numel) in enumerate(ranges):
            matrices.append((SHAPES[number], ParamShard(str(number), start, numel, torch.empty(0), offset)))
            offset += numel
        parts = [whole_matrix(number)[start : start + n] for number, (start, n) in enumerate(ranges)]
        flat = torch.cat(parts)
        owners = MatrixOwners(matrices, world)
        whole = owners.collect(flat)
        returned = owners.distribute([3 * matrix for matrix in whole])
        back = {shard.name: part.tolist() for shard, part in returned}
        own = {number: matrix.tolist() for number, matrix in zip(owners.own, whole, strict=True)}
        results.append({"own": own, "back": back})
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_matrices_come_together_whole_and_results_return_to_the_shards(ranks: int):
    seeds = 12
    by_rank = gloo_ranks.run(ranks, exchanged, seeds)
    for seed in range(seeds):
        collected: dict[int, list] = {}
        for rank in by_rank:
            assert not collected.keys() & rank[seed]["own"].keys()
            collected |= rank[seed]["own"]
        for number, shape in enumerate(SHAPES):
            whole = whole_matrix(number)
            assert torch.equal(torch.tensor(collected[number]), whole.view(shape))
            for rank, (start, numel) in enumerate(ranges[number] for ranges in layout(ranks, seed)):
                assert by_rank[rank][seed]["back"][str(number)] == (3 * whole)[start : start + numel].tolist()


def test_a_matrix_belongs_to_the_rank_that_holds_most_of_it():
    assert assign_owners(SHAPES[:2], [[(0, 10), (0, 3)], [(10, 5), (3, 11)]]) == [0, 1]


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=9))
def test_equal_shares_are_shared_out_by_work(ranks: int, shapes: list[tuple[int, int]]):
    """No rank has more than the largest matrix over the least loaded."""
    sizes = [torch.Size(shape) for shape in shapes]
    owners = assign_owners(sizes, [[(0, 1)] * len(sizes)] * ranks)
    work, costs = [0] * ranks, [shape.numel() * min(shape) for shape in sizes]
    for cost, owner in zip(costs, owners, strict=True):
        work[owner] += cost
    assert max(work) - min(work) <= max(costs, default=0)
