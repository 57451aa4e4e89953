"""Opens the weights of ``init.from``: a run's checkpoint or a Hugging Face folder, by our names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
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
from train.pretrained.inspect_source import SourceDescription, describe_source
from train.util.reading import reading
from train.util.run_layout import RunDir


class WeightReader(Protocol):
    """Reads parameters by our names, a range at a time."""

    def shape(self, name: str) -> Shape | None:
        """Shape of a parameter, or None where it is missing."""

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, in the floating-point format it is stored in."""

    def unread(self, read: Collection[str]) -> list[str]:
        """Parameters that are not among those ``read``, by their names in the source."""

    def unread_backbone(self, read: Collection[str], skipped: Iterable[str]) -> list[str]:
        """Those of them that its backbone computes with, without a pooler and without our parameters ``skipped``."""


@dataclass(frozen=True)
class WeightOrigin:
    """An opened source of weights."""

    description: SourceDescription
    digest: str
    """Hash that identifies its content."""
    tokenizer: bytes | None
    """Content of its tokenizer.json, if it has one."""
    reader: WeightReader


def open_weights(folder: Path, which: str, world: process_group.DistContext) -> WeightOrigin:
    """Open the weights of ``folder``, as ``inspect_source.describe_source`` identifies it. A collective.

    Raises UserError as that does, and where weights are damaged or ranks see different content.
    """
    description = describe_source(folder, which)
    if description.family is not None:
        hf_folder = HFFolder(folder)
        process_group.assert_equal_across_ranks("content of init.from", hf_folder.digest)
        weights = HFWeights(hf_folder, description.family, tied=description.arch["tied"])
        return WeightOrigin(description, hf_folder.digest, hf_folder.tokenizer, weights)
    assert description.manifest is not None
    checkpoint = Checkpoint(RunDir(folder).checkpoint(description.manifest["progress"]["step"]), description.manifest)
    process_group.assert_equal_across_ranks("checkpoint that init.from names", checkpoint.digest)
    own_share = checkpoint.damage(slice(world.rank, None, world.size))
    if damage := next((d for d in process_group.gather_objects(own_share) if d), None):
        raise UserError(f"{checkpoint.path} is damaged: {damage}. Choose another with init.checkpoint=<step>")
    with reading(folder / TOKENIZER, "Restore it from where the run was trained"):
        tokenizer = (folder / TOKENIZER).read_bytes()
    return WeightOrigin(description, checkpoint.digest, tokenizer, CheckpointWeights(checkpoint))


class CheckpointWeights:
    """The fp32 weights of a run's checkpoint (a ``WeightReader``)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.reader, self.shapes = checkpoint.reader(keep_open=True), checkpoint.manifest["shapes"]

    def shape(self, name: str) -> Shape | None:
        """See ``WeightReader.shape``."""
        return tuple(self.shapes[name]) if name in self.shapes else None

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """See ``WeightReader.read``."""
        return self.reader.read(name, MASTER, start, numel)

    def unread(self, read: Collection[str]) -> list[str]:
        """See ``WeightReader.unread``."""
        return sorted(self.shapes.keys() - {*read})

    def unread_backbone(self, read: Collection[str], skipped: Iterable[str]) -> list[str]:
        """See ``WeightReader.unread_backbone``."""
        left = {*skipped}
        names = [name for name in self.unread(read) if name.startswith("backbone.") and name not in left]
        return [name for name in names if not name.startswith("backbone.pooler.")]
