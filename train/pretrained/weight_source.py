"""What a model may start from: a run of ours at one of its checkpoints, or a Hugging Face folder; both by our names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from train.checkpoint.reader import Checkpoint
from train.data.tokenizer import FILE as TOKENIZER
from train.distributed import process_group
from train.distributed.param_shard import MASTER
from train.errors import UserError
from train.pretrained.hf.family import Shape
from train.pretrained.hf.folder import HFFolder, HFWeights
from train.pretrained.inspect_source import SourceDescription, describe
from train.util.run_layout import RunDir


class WeightReader(Protocol):
    """Parameters by our names, read one at a time."""

    def shape(self, name: str) -> Shape | None:
        """Of a parameter, or None where it is missing."""

    def read(self, name: str) -> Tensor:
        """A parameter, in some floating-point format."""

    def left(self) -> list[str]:
        """What is there and was not read, by its names there."""


@dataclass(frozen=True)
class WeightOrigin:
    """Where weights come from."""

    model: SourceDescription
    digest: str
    """Tells its content from any other."""
    tokenizer: bytes | None
    """The content of its tokenizer.json."""
    source: WeightReader


def open_origin(folder: Path, which: str, world: process_group.DistContext) -> WeightOrigin:
    """What ``folder`` holds, as ``train.pretrained.inspect_source.describe`` has it, with its weights. A collective.

    Raises UserError as that does, and for weights that are damaged.
    """
    model = describe(folder, which)
    if model.family is not None:
        there = HFFolder(folder)
        process_group.assert_equal_across_ranks("content of init.from", there.digest)
        return WeightOrigin(model, there.digest, there.tokenizer, HFWeights(there, model.family))
    assert model.manifest is not None
    checkpoint = Checkpoint(RunDir(folder).checkpoint(model.manifest["progress"]["step"]), model.manifest)
    process_group.assert_equal_across_ranks("checkpoint that init.from names", checkpoint.digest)
    mine = checkpoint.damage(slice(world.rank, None, world.size))
    if damage := next((d for d in process_group.gather_objects(mine) if d), None):
        raise UserError(f"{checkpoint.path} is damaged: {damage}. Choose another with init.checkpoint=<step>")
    return WeightOrigin(model, checkpoint.digest, (folder / TOKENIZER).read_bytes(), SavedWeights(checkpoint))


@dataclass
class SavedWeights:
    """The weights of a run's checkpoint."""

    checkpoint: Checkpoint
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Opens its files."""
        self.reader, self.shapes = self.checkpoint.reader(), self.checkpoint.manifest["shapes"]

    def shape(self, name: str) -> Shape | None:
        """As of Source."""
        return tuple(self.shapes[name]) if name in self.shapes else None

    def read(self, name: str) -> Tensor:
        """As of Source."""
        self.taken.add(name)
        return self.reader.read(name, MASTER, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def left(self) -> list[str]:
        """As of Source."""
        return sorted(self.shapes.keys() - self.taken)
