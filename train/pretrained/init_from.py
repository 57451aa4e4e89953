"""The weights that a new run begins with, drawn or of ``init.from``; and frozen parameters (``init.freeze``).

Every rank reads, or draws, its shards of them in fp32 and nothing else, so nothing depends on ZeRO stage or world size.
A run that resumes from a checkpoint of its own does neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from train.config.schema import Config
from train.data.tokenizer import FILE as TOKENIZER
from train.data.tokenizer import Tokenizer, encoding_digest
from train.distributed import process_group
from train.distributed.param_shard import ParamShard, nonfinite_parameters
from train.errors import UserError
from train.models.initial_weights import InitialWeights, ReadWeights
from train.objectives import describe_objective
from train.pretrained.hf.family import Shape
from train.pretrained.inspect_source import list_differences, mismatch_error
from train.pretrained.weight_source import WeightOrigin, open_weights
from train.util.format import plural, some

POOLER_PATTERN = "backbone.pooler.*"
"""Parameters that an encoder pretrained without sentence pairs does not have: initialised where they are missing."""
MAX_LISTED = 12
"""Differences listed in one message."""


@dataclass(frozen=True)
class LoadReport:
    """Parameters that ``init.from`` gave and did not give; its fields are the keys of the run's ``init.json``."""

    origin: str
    kind: str
    digest: str
    loaded: list[str]
    fresh: list[str]
    """Parameters of the run that were initialised instead."""
    left: list[str]
    """Parameters of the source that were not read, by their names there."""

    def summary(self) -> str:
        """One line for the console."""
        total = len(self.loaded) + len(self.fresh)
        text = f"weights from {self.origin} ({self.kind}): {len(self.loaded)} of {plural(total, 'tensor')} loaded"
        text += f"; drawn afresh: {some(self.fresh)}" if self.fresh else ""
        return text + (f"; left there: {some(self.left)}" if self.left else "")


@dataclass(frozen=True)
class FirstWeights:
    """The weights of step 0 of a run."""

    read: ReadWeights
    report: LoadReport | None = None
    """What of them ``init.from`` gave; None where all are drawn."""


def first_weights(config: Config, tokenizer: Tokenizer, world: process_group.DistContext) -> FirstWeights:
    """The weights of step 0: those of ``init.from`` for the backbone, and for the head where objectives are equal and
    shapes fit; what it does not give, or all without it, is drawn.

    Raises UserError that lists everything that does not fit. A collective.
    """
    objective = describe_objective(config, tokenizer.vocab_size)
    drawn, init, parameters = InitialWeights(objective, config.seed), config.init, dict(objective.named_parameters())
    if not init.from_:
        return FirstWeights(drawn.read)
    origin = open_weights(Path(str(init.from_)), str(init.checkpoint), world)
    refuse_unmatched_patterns("init.skip", init.skip, list(parameters))
    shapes, differ = _source_shapes(origin, config, parameters)
    problems = list_differences(
        origin.description, config, len(parameters["backbone.embed.weight"]), shapes_differ=bool(differ)
    )
    for name, shape in differ.items():
        if is_backbone_parameter(name):
            problems.append(f"{name} is {_shape_text(parameters[name].shape)} here, {_shape_text(shape)} there")
    if len(problems) > MAX_LISTED:
        problems = [*problems[:MAX_LISTED], f"and {len(problems) - MAX_LISTED} more"]
    problems += _tokenizer_problems(origin, config, tokenizer, shapes)
    if problems:
        raise mismatch_error(config, origin.description, problems)
    loaded = [name for name in shapes if name not in differ]
    skipped = [name for name in parameters if matches_any(name, init.skip)]
    if ignored := origin.reader.unread_backbone(loaded, skipped):
        problem = f"it holds {some(ignored)}, which the model of this run has no place for, and would compute otherwise"
        raise mismatch_error(config, origin.description, [problem])
    given = set(loaded)
    fresh, left = [name for name in parameters if name not in given], origin.reader.unread(given)
    report = LoadReport(str(init.from_), origin.description.kind, origin.digest, loaded, fresh, left)

    def read(name: str, start: int, numel: int) -> Tensor:
        return (origin.reader if name in given else drawn).read(name, start, numel)

    return FirstWeights(read, report)


def _source_shapes(
    origin: WeightOrigin, config: Config, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Shape | None], dict[str, Shape | None]]:
    """The shapes, there, of the parameters that are to be loaded, and of those among them that have another here."""
    same_objective = origin.description.objective == config.objective.name
    shapes: dict[str, Shape | None] = {}
    for name in parameters:
        if matches_any(name, config.init.skip) or not (same_objective or is_backbone_parameter(name)):
            continue
        shape = origin.reader.shape(name)
        if shape is not None or not matches_any(name, [POOLER_PATTERN]):
            shapes[name] = shape
    return shapes, {name: shape for name, shape in shapes.items() if shape != tuple(parameters[name].shape)}


def refuse_unusable(config: Config, report: LoadReport, shards: Iterable[ParamShard]) -> None:
    """Raise UserError where loaded weights are not finite in fp32, or all are 0: no data would be to blame then.

    ``shards`` are this rank's, filled. A collective.
    """
    loaded = set(report.loaded)
    own = [shard for shard in shards if shard.name in loaded]
    if broken := nonfinite_parameters(own):
        raise UserError(
            f"init.from={config.init.from_} holds numbers that are not finite (in fp32), in "
            f"{some(broken)}: nothing can be trained from them. Take the weights of an earlier time, or save them again"
        )
    nonzero = any(shard.view_of(shard.holder).any() for shard in own)
    if loaded and not any(process_group.gather_objects(nonzero)):
        raise UserError(f"init.from={config.init.from_} holds nothing but zeros: fetch it again")


def _tokenizer_problems(
    origin: WeightOrigin, config: Config, tokenizer: Tokenizer, names: Iterable[str]
) -> Iterator[str]:
    """The problem of an embedding among ``names`` that was trained with another tokenizer, at most one."""
    if origin.tokenizer is None or "backbone.embed.weight" not in names:
        return
    if not _same_tokens(origin.tokenizer, tokenizer.content):
        yield (
            "its tokens are not those of this corpus: give data.tokenizer.kind=file "
            f"data.tokenizer.path={config.init.from_}/{TOKENIZER}, or leave its embedding there: init.skip=['*embed*']"
        )


def _same_tokens(theirs: bytes, ours: str) -> bool:
    """Whether two tokenizers give every text the same ids, whatever else their files say."""
    if theirs == ours.encode():
        return True
    with contextlib.suppress(UserError, UnicodeDecodeError):
        return encoding_digest(theirs.decode()) == encoding_digest(ours)
    return False


def freeze_parameters(objective: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose names match any of ``patterns``; returns their names."""
    parameters = dict(objective.named_parameters())
    refuse_unmatched_patterns("init.freeze", patterns, list(parameters))
    frozen = [name for name in parameters if matches_any(name, patterns)]
    if len(frozen) == len(parameters):
        raise UserError(f"init.freeze={list(patterns)} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def refuse_unmatched_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise UserError for patterns of the configuration ``key`` that match none of ``names``: they are typos."""
    unmatched = []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            unmatched.append(pattern)
    if unmatched:
        raise UserError(f"{key}: {', '.join(map(repr, unmatched))} matches no parameter. There are {some(names)}")


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name matches any of the patterns (``*``, ``?``, ``[abc]``)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_backbone_parameter(name: str) -> bool:
    """Whether a parameter belongs to the backbone, not to an objective's head."""
    return name.startswith("backbone.")


def _shape_text(shape: Shape | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
