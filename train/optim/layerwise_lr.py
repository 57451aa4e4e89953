"""Layer-wise learning-rate decay for fine-tuning: layers nearer the input change less."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BLOCK = re.compile(r".*?\.\d+\.")


def depths(names: Sequence[str]) -> dict[str, int]:
    """Depth of each parameter in the order of construction: 0 before the first block, 1 in it, and so on.

    What follows the last block (a norm, a pooler, a head) is one deeper; between two stacks, as the block before.
    """
    blocks: dict[str, int] = {}
    found = {}
    for name in names:
        block = BLOCK.match(name)
        if block:
            blocks.setdefault(block[0], len(blocks) + 1)
        found[name] = blocks[block[0]] if block else len(blocks)
    last = max((n for n, name in enumerate(names) if BLOCK.match(name)), default=-1)
    return found | {name: len(blocks) + 1 for name in names[last + 1 :]}


def by_depth(groups: Sequence[dict[str, Any]], names: Sequence[str], decay: float) -> list[dict[str, Any]]:
    """Split the optimizer's ``groups`` so that each parameter's rate is ``decay`` ** (its distance from the top).

    As in ELECTRA (Clark et al. 2020) and BEiT: the head has the full rate, the last block ``decay`` times it, and so on
    down to the embedding. ``names`` are those of all parameters. The factor of a group is its ``lr_scale``.
    """
    depth = depths(names)
    top = max(depth.values())
    split: list[dict[str, Any]] = []
    for group in groups:
        for level in sorted({depth[name] for name in group["names"]}):
            members = [n for n, name in enumerate(group["names"]) if depth[name] == level]
            part = {key: [group[key][n] for n in members] for key in ("names", "params")}
            split.append(group | part | {"lr_scale": decay ** (top - level)})
    return split
