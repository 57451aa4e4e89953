"""Rules of a mixture's keys: sources that can be found, weights that are shares, stages that follow each other."""

from __future__ import annotations

from collections.abc import Mapping

from train.config.keys.mixture import SourceConfig
from train.config.schema import Config
from train.config.suggest import did_you_mean

EXAMPLE = "data.sources={code: {source: stdlib, weight: 3}, notes: {paths: [notes], weight: 1}}"


def mixture_problems(config: Config) -> list[str]:
    """Problems of ``data.sources`` and ``data.stages`` that are seen without reading anything, each with its cure."""
    data = config.data
    if data.source != "mix":
        return []
    if not data.sources:
        return [f"data=mix needs its sources, such as '{EXAMPLE}'"]
    problems = []
    for name, source in data.sources.items():
        problems += _source_problems(f"data.sources.{name}", source, config)
    weighted = {name: source.weight for name, source in data.sources.items() if source.weight is not None}
    if data.stages and weighted:
        problems.append(
            f"data.stages has the weights, and so has data.sources.{next(iter(weighted))}.weight: leave one of them out"
        )
    elif weighted and (bare := [name for name in data.sources if name not in weighted]):
        problems.append(
            f"data.sources.{bare[0]} has no weight, and {next(iter(weighted))} has one: give every source a weight, "
            "or none, and then each has a share in proportion to its epochs or tokens"
        )
    elif weighted:
        problems += _weight_problems("data.sources", weighted, config)
    for number, stage in enumerate(data.stages):
        problems += _weight_problems(f"data.stages[{number}].weights", stage.weights, config)
    if config.model.carries_state and config.objective.name == "causal":
        problems.append(
            "model.carry needs rows that go on from step to step, and those of data=mix do not: set model.carry=false"
        )
    return problems + _order_problems(config)


def _source_problems(key: str, source: SourceConfig, config: Config) -> list[str]:
    problems = []
    if source.dir is not None and (source.paths or source.source != "text"):
        problems.append(f"{key} has a prepared corpus, dir, and text beside it, paths or source: give one of them")
    if source.dir is None and source.source == "text" and not source.paths:
        problems.append(f"{key} has nothing to read: give it dir, a prepared corpus, or paths, or source: stdlib")
    if source.source == "stdlib" and source.paths:
        problems.append(f"{key} has paths, and source: stdlib reads none: leave one of them out")
    if source.epochs is not None and source.tokens is not None:
        problems.append(f"{key} has both epochs and tokens: give one of them")
    if source.tokens is not None and not config.data.pack:
        problems.append(f"{key} has tokens, and with data.pack=false rows are documents: give it epochs")
    return problems


def _weight_problems(key: str, weights: Mapping[str, float | None], config: Config) -> list[str]:
    names = list(config.data.sources)
    problems = [
        f"{key} names {name!r}, which is none of data.sources{did_you_mean(name, names)}. There are: {', '.join(names)}"
        for name in weights
        if name not in names
    ]
    if not any(weights.values()):
        problems.append(f"{key}: all weights are 0: give at least one source a share")
    return problems


def last_step(until: float | None, steps: int) -> int:
    """The last step of a stage: a fraction is of all ``steps``; None, and 1, mean the last of all."""
    if until is None or until == 1:
        return steps
    return until if isinstance(until, int) else round(until * steps)


def _order_problems(config: Config) -> list[str]:
    ends = [last_step(stage.until, config.steps) for stage in config.data.stages]
    problems = []
    for number, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end <= before:
            problems.append(
                f"data.stages[{number}] ends at step {end}, and it begins after step {before}: the stages follow each "
                "other, so let until grow"
            )
    if ends and ends[-1] < config.steps:
        problems.append(
            f"the last of data.stages ends at step {ends[-1]}, and steps={config.steps} are to be made: "
            "let it end at 1.0, or leave its until out"
        )
    return problems
