"""Layer-wise learning-rate decay for fine-tuning: layers nearer the input change less."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BLOCK = re.compile(r".*?\.\d+\.")


def layer_depths(names: Sequence[str]) -> dict[str, int]:
    """Depth of each parameter in the order of construction: 0 before the first block, 1 in it, and so on.

    Modules after the last block (norm, pooler, head) are one deeper; between two stacks, as the block before.
    """
    blocks: dict[str, int] = {}
    depths = {}
    for name in names:
        block = BLOCK.match(name)
        if block:
            blocks.setdefault(block[0], len(blocks) + 1)
        depths[name] = blocks[block[0]] if block else len(blocks)
    last = max((n for n, name in enumerate(names) if BLOCK.match(name)), default=-1)
    return depths | dict.fromkeys(names[last + 1 :], len(blocks) + 1)


def split_by_depth(groups: Sequence[dict[str, Any]], names: Sequence[str], decay: float) -> list[dict[str, Any]]:
    """Split the optimizer's ``groups`` so that each parameter's rate is scaled by ``decay`` ** (distance from the top).

    As in ELECTRA (Clark et al. 2020) and BEiT: the head has the full rate, the last block ``decay`` times it, and so on
    down to the embedding. ``names`` are those of all parameters. The factor of a group is its ``lr_scale``.
    """
    depth = layer_depths(names)
    top = max(depth.values())
    split: list[dict[str, Any]] = []
    for group in groups:
        for level in sorted({depth[name] for name in group["names"]}):
            part = group | {"names": [], "params": [], "lr_scale": decay ** (top - level)}
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if depth[name] == level:
                    part["names"].append(name)
                    part["params"].append(parameter)
            split.append(part)
    return split
