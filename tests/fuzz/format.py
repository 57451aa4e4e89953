"""What a format of the fuzz is, and reading mutated content as a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import mutate


@dataclass(frozen=True)
class Format:
    """A format: valid contents, how they are mutated, and the product's reading of one."""

    name: str
    seeds: list[bytes]
    mutation: mutate.Mutation
    read: Callable[[bytes], object]


def in_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """A reader that finds the mutated content in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def written(content: bytes) -> object:
        path.write_bytes(content)
        return read()

    return written
