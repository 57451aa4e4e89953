"""What a model may start from: a run of ours at one of its checkpoints, or a Hugging Face folder; both by our names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from train import config as configuration
from train import dist
from train.checkpoint import Checkpoint, inventory
from train.data.tokenizer import FILE as TOKENIZER
from train.errors import UserError
from train.hf import family_named
from train.hf.family import Facts, Shape, facts_of
from train.hf.folder import CONFIG, Folder, Weights
from train.pieces import MASTER
from train.saved import choose


class Source(Protocol):
    """Parameters by our names, read one at a time."""

    def shape(self, name: str) -> Shape | None:
        """Of a parameter, or None where it is missing."""

    def read(self, name: str) -> Tensor:
        """A parameter, in some floating-point format."""

    def left(self) -> list[str]:
        """What is there and was not read, by its names there."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from."""

    kind: str
    """In words."""
    digest: str
    """Tells its content from any other."""
    objective: str
    facts: Facts
    tokenizer: bytes | None
    """The content of its tokenizer.json."""
    source: Source


def open_origin(folder: Path, which: str, world: dist.World) -> Origin:
    """What ``folder`` holds; of a run, the checkpoint ``which``: "latest", "best" or a step.

    Raises UserError for a folder that holds neither, or what cannot be used. A collective.
    """
    if (folder / "config.yaml").exists():
        return _of_run(folder, which, world)
    if (folder / CONFIG).exists():
        return _of_hugging_face(folder)
    raise UserError(
        f"init.from={folder} is neither a run (which has a config.yaml) nor a Hugging Face folder (which has a {CONFIG}), "
        f"or not every worker sees it (looked from {Path.cwd()})"
    )


def _of_run(folder: Path, which: str, world: dist.World) -> Origin:
    config = configuration.read(folder / "config.yaml")
    checkpoint = choose(inventory(folder / "checkpoints")[0], which, folder)
    dist.same_everywhere("checkpoint that init.from names", checkpoint.digest)
    mine = checkpoint.damage(slice(world.rank, None, world.size))
    if damage := next((d for d in dist.gather_objects(mine) if d), None):
        raise UserError(f"{checkpoint.path} is damaged: {damage}. Choose another with init.checkpoint=<step>")
    facts = facts_of(config.model, checkpoint.manifest["shapes"]["backbone.embed.weight"][0])
    kind = f"a run, step {checkpoint.progress.step}"
    tokenizer = (folder / TOKENIZER).read_bytes()
    return Origin(kind, checkpoint.digest, config.objective.name, facts, tokenizer, SavedWeights(checkpoint))


def _of_hugging_face(folder: Path) -> Origin:
    there = Folder(folder)
    family = family_named(there.config, str(folder / CONFIG))
    facts, strange = family.facts(there.config)
    if strange:
        raise UserError(f"{folder / CONFIG} describes a model that is not one of ours: {'; '.join(strange)}")
    dist.same_everywhere("content of init.from", there.digest)
    source = Weights(there, family)
    objective = family.objective(there.config)
    return Origin(f"Hugging Face, {family.name}", there.digest, objective, facts, there.tokenizer, source)


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
