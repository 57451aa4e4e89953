"""Shares and stages of a configuration, in steps; what a resumed run may change of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from train.config.keys.mixture import StageConfig
from train.config.mixture_rules import last_step
from train.config.schema import Config
from train.data.corpus.shards import CorpusSplit
from train.data.mixing.mixture_corpus import first_samples
from train.data.mixing.mixture_plan import MixturePlan, MixtureSources
from train.data.mixing.mixture_schedule import PARTS, Budgets, MixtureSchedule, Stage, parts_of, same_until
from train.data.mixing.source_rows import SourceRows
from train.data.sampling.batch_plan import StepShape
from train.data.sampling.epoch_order import EpochOrder
from train.errors import UserError


def resolved_stages(config: Config, tokens: Mapping[str, int]) -> list[StageConfig]:
    """The stages of training: ends in steps, the last without one, and shares of every source that add up to 1.

    ``tokens`` are those of one epoch of each source. Stages that are resolved already stay as they are.
    """
    data = config.data
    stages = data.stages or [StageConfig(until=None, weights=_weights(config, tokens))]
    resolved = []
    for stage in stages:
        end = last_step(stage.until, config.steps)
        parts = parts_of([stage.weights.get(name, 0.0) for name in tokens], list(tokens))
        shares = {name: part / PARTS for name, part in zip(tokens, parts, strict=True)}
        resolved.append(StageConfig(until=None if stage is stages[-1] else end, weights=shares))
    return _merged(resolved)


def _merged(stages: Sequence[StageConfig]) -> list[StageConfig]:
    """The stages without those that the next one goes on with the same shares."""
    changed = [stage for stage, after in pairwise(stages) if after.weights != stage.weights]
    return [*changed, stages[-1]]


def _weights(config: Config, tokens: Mapping[str, int]) -> dict[str, float]:
    """The weights of the sources; where none has any, the tokens that are to be read of each."""
    sources = config.data.sources
    if any(source.weight is not None for source in sources.values()):
        return {name: sources[name].weight or 0.0 for name in tokens}
    return {name: float(sources[name].tokens or (sources[name].epochs or 1) * size) for name, size in tokens.items()}


def mixture_plan(
    config: Config, parts: Mapping[str, CorpusSplit], orders: Mapping[str, EpochOrder], shape: StepShape
) -> MixturePlan:
    """The plan of a mixture whose sources have the training splits ``parts``, in the orders ``orders``."""
    data, rows = config.data, []
    for name, order in orders.items():
        if not order.units:
            raise UserError(f"nothing to train on: the source {name} holds no documents")
        source = data.sources[name]
        limit = source.tokens or max(1, round((source.epochs or 1) * order.units))
        row_units = shape.seq_len if shape.pack else 1
        rows.append(SourceRows(order, row_units, None if data.exhausted == "repeat" else limit))
    stages = resolved_stages(config, {name: split.tokens for name, split in parts.items()})
    budgets = Budgets(tuple(source_rows.rows for source_rows in rows), stop=data.exhausted == "stop")
    schedule = MixtureSchedule(stages_in_rows(stages, config.batch.sequences), budgets)
    return MixturePlan(rows, schedule, MixtureSources(tuple(parts), first_samples(parts)), shape)


def stages_in_rows(stages: Sequence[StageConfig], rows: Callable[[int], int]) -> list[Stage]:
    """Resolved stages as the schedule needs them; ``rows(n)`` are the rows of the first n steps."""
    firsts = [0, *(rows(int(stage.until or 0)) for stage in stages[:-1])]
    parts = [parts_of(list(stage.weights.values()), list(stage.weights)) for stage in stages]
    return [Stage(first, part) for first, part in zip(firsts, parts, strict=True)]


def continued_stages(
    old: Sequence[StageConfig], new: Sequence[StageConfig], step: int, steps: int, reweight: bool
) -> list[StageConfig]:
    """The stages of a run that goes on after ``step``, where it was begun with the stages ``old``, of ``steps`` steps.

    Up to ``step`` they are the old ones. Raises UserError where they differ after it, and ``reweight`` was not given.
    """
    was, wanted = (stages_in_rows(stages, lambda step: step) for stages in (old, new))
    if not step or same_until(was, wanted, steps):
        return list(new)
    if not reweight:
        raise UserError(
            f"the shares of this run's sources are {describe_stages(old)}, and this command says "
            f"{describe_stages(new)}. With data.reweight=true the run goes on after step {step} with these, and "
            "nothing that it has read comes again; else give the old ones, or another run.name to start anew"
        )
    kept = [stage for stage in old if stage.until is None or stage.until > step]
    before = [stage for stage in old if stage not in kept]
    after = [stage for stage in new if stage.until is None or stage.until > step]
    first = kept[0].model_copy(update={"until": step})
    last_end = before[-1].until if before else 0
    return _merged([*before, *([first] if last_end != step else []), *after])


def describe_stages(stages: Sequence[StageConfig]) -> str:
    """Stages in words, such as "code 70 %, notes 30 % to step 800; code 50 %, notes 50 % to the end"."""
    parts = []
    for stage in stages:
        shares = ", ".join(f"{name} {weight:.4g}" for name, weight in stage.weights.items())
        parts.append(f"{shares} to {'the end' if stage.until is None else f'step {stage.until}'}")
    return "; ".join(parts)
