"""Which elements of the training state lie in which file of a checkpoint.

Under ZeRO-3 each rank holds an even share of every parameter. A manifest then names the parameter once, and not once a
rank: at 70 billion parameters on 1,024 ranks two million pieces follow from two thousand names.

    even share   of a parameter of n elements, rank r of R: [r e, min((r + 1) e, n)), e = ceil(n / R)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from train.util.run_layout import shard_name

Piece = tuple[int, int, str]
"""(first element, elements, file)."""
Even = dict[str, list[str]]
"""Parameters that every rank holds its even share of, by kind (weight or moment)."""


def even_share(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """The first element, and the number of elements, of a rank's even share; no elements for the last ranks' may be."""
    each = -(-numel // ranks)
    start = min(rank * each, numel)
    return start, min(each, numel - start)


def without_even(
    pieces: Iterable[list[Any]], shapes: Mapping[str, list[int]], rank: int, ranks: int, apart: Collection[str]
) -> tuple[list[list[Any]], Even]:
    """A rank's pieces [kind, parameter, first element, elements] of the parameters ``apart``, and the names of others.

    Raises ValueError where one of the others is not the rank's even share.
    """
    kept, even = [], Even()
    for piece in pieces:
        kind, name, *held = piece
        if name in apart:
            kept.append(piece)
        elif tuple(held) != even_share(math.prod(shapes[name]), rank, ranks):
            raise ValueError(f"rank {rank} holds {held} of {name}, which is not its even share of {shapes[name]}")
        else:
            even.setdefault(kind, []).append(name)
    return kept, even


def pieces_in_file(values: Mapping[str, Any], file: str) -> Iterator[list[Any]]:
    """The pieces [kind, parameter, first element, elements] of a file of the manifest ``values``."""
    files = values["files"]
    yield from files[file]["pieces"]
    if even := values.get("even"):
        numbers = {shard_name(rank): rank for rank in range(len(files))}
        for kind, names in even.items():
            for name in names:
                start, numel = even_share(math.prod(values["shapes"][name]), numbers[file], len(files))
                if numel:
                    yield [kind, name, start, numel]


class PieceTable(Mapping[tuple[str, str], list[Piece]]):
    """The pieces of a checkpoint in ascending order, by (parameter, kind); made when they are asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """``values`` of a manifest."""
        self._ranks, self._shapes = len(values["files"]), values["shapes"]
        self._even = {(name, kind) for kind, names in values.get("even", {}).items() for name in names}
        self._listed: dict[tuple[str, str], list[Piece]] = {}
        for file, entry in values["files"].items():
            for kind, name, start, numel in entry["pieces"]:
                self._listed.setdefault((name, kind), []).append((start, numel, file))
        for listed in self._listed.values():
            listed.sort()

    def __getitem__(self, key: tuple[str, str]) -> list[Piece]:
        return list(self.overlapping(*key, 0, self.numel(*key)))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter({**self._listed, **dict.fromkeys(self._even)})

    def __len__(self) -> int:
        return len(self._listed.keys() | self._even)

    def numel(self, name: str, kind: str) -> int:
        """Elements that the checkpoint has of a kind of a parameter."""
        if (name, kind) in self._even:
            return math.prod(self._shapes[name])
        return sum(piece[1] for piece in self._listed[name, kind])

    def overlapping(self, name: str, kind: str, start: int, end: int) -> Iterator[Piece]:
        """The pieces that have any of the elements [start, end)."""
        if (name, kind) in self._even:
            numel = math.prod(self._shapes[name])
            each = max(1, -(-numel // self._ranks))
            for rank in range(start // each, -(-min(end, numel) // each)):
                yield *even_share(numel, rank, self._ranks), shard_name(rank)
            return
        listed = self._listed.get((name, kind), [])
        for piece in listed[max(0, bisect_right([piece[0] for piece in listed], start) - 1) :]:
            if piece[0] >= end:
                break
            yield piece
