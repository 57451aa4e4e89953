"""The weights that a run starts from where it does not draw them, and what of them is not trained.

Every rank reads them, a tensor at a time, into the one copy of the model that it holds before ZeRO shards it, so nothing depends on
the stage or the world. A run that goes on from a checkpoint of its own does not look here again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from train.config.schema import Config
from train.data.tokenizer import FILE as TOKENIZER
from train.data.tokenizer import Tokenizer
from train.distributed import process_group
from train.errors import UserError
from train.pretrained.hf.family import Shape
from train.pretrained.inspect_source import misfit, other_facts
from train.pretrained.weight_source import WeightOrigin, open_origin
from train.util.format import plural, some

POOLER = "backbone.pooler.*"
"""What an encoder that was pretrained without pairs of text never had: it is drawn where it is not there."""
MOST = 12
"""Problems in a list of them."""


@dataclass(frozen=True)
class LoadReport:
    """What was taken from where: names of parameters."""

    origin: str
    kind: str
    digest: str
    loaded: list[str]
    fresh: list[str]
    """Those of ours that were drawn."""
    left: list[str]
    """What is there and was not wanted, by its names there."""

    def words(self) -> str:
        """One line."""
        total = len(self.loaded) + len(self.fresh)
        text = f"weights from {self.origin} ({self.kind}): {len(self.loaded)} of {plural(total, 'tensor')} loaded"
        text += f"; drawn afresh: {some(self.fresh)}" if self.fresh else ""
        return text + (f"; left there: {some(self.left)}" if self.left else "")


def load_weights(
    objective: nn.Module, config: Config, tokenizer: Tokenizer, world: process_group.DistContext
) -> LoadReport:
    """Load ``init.from`` into ``objective``: its backbone, and its head where both are of one objective and it fits.

    Raises UserError, naming all of it, for what does not fit. A collective.
    """
    init, parameters = config.init, dict(objective.named_parameters())
    origin = open_origin(Path(str(init.from_)), str(init.checkpoint), world)
    refuse_unmatched("init.skip", init.skip, list(parameters))
    same = origin.model.objective == config.objective.name
    wanted = [name for name in parameters if not matches(name, init.skip) and (same or in_backbone(name))]
    there = {name: origin.source.shape(name) for name in wanted}
    wanted = [name for name in wanted if there[name] is not None or not matches(name, [POOLER])]
    there = {name: there[name] for name in wanted}
    differ = {name: shape for name, shape in there.items() if shape != tuple(parameters[name].shape)}
    problems = other_facts(origin.model, config, len(objective.get_parameter("backbone.embed.weight")), bool(differ))
    problems += [
        f"{n} is {_size(parameters[n].shape)} here, {_size(s)} there" for n, s in differ.items() if in_backbone(n)
    ]
    problems = [*problems[:MOST], *([f"and {len(problems) - MOST} more"] if len(problems) > MOST else [])]
    problems += _other_tokens(origin, config, tokenizer, wanted)
    if problems:
        raise misfit(config, origin.model, problems)
    loaded = [name for name in wanted if name not in differ]
    for name in loaded:
        parameters[name].data.copy_(origin.source.read(name))
    fresh = [name for name in parameters if name not in set(loaded)]
    return LoadReport(str(init.from_), origin.model.kind, origin.digest, loaded, fresh, origin.source.left())


def _other_tokens(origin: WeightOrigin, config: Config, tokenizer: Tokenizer, wanted: Iterable[str]) -> Iterator[str]:
    """That a row of the embedding is another token there."""
    if origin.tokenizer is None or "backbone.embed.weight" not in wanted:
        return
    if hashlib.sha256(origin.tokenizer).hexdigest() != tokenizer.fingerprint:
        yield (
            "its tokens are not those of this corpus: give data.tokenizer.kind=file "
            f"data.tokenizer.path={config.init.from_}/{TOKENIZER}, or leave its embedding there: init.skip=['*embed*']"
        )


def freeze(objective: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Take the parameters whose names match any of ``patterns`` out of training; their names."""
    parameters = dict(objective.named_parameters())
    refuse_unmatched("init.freeze", patterns, list(parameters))
    frozen = [name for name in parameters if matches(name, patterns)]
    if len(frozen) == len(parameters):
        raise UserError(f"init.freeze={list(patterns)} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def refuse_unmatched(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for patterns that match no name: they are mistakes."""
    if lost := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        raise UserError(f"{key}: {', '.join(map(repr, lost))} matches no parameter. There are {some(names)}")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name matches any of the patterns (``*``, ``?``, ``[abc]``)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def in_backbone(name: str) -> bool:
    """Whether a parameter is the model's own, not an objective's."""
    return name.startswith("backbone.")


def _size(shape: Shape | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
