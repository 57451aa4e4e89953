"""Settles a mixture before its run starts: stages in steps, what an earlier start has read, the last step there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.checkpoint import manifest
from train.config import load as configuration
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.mixing.mixture_corpus import open_corpus
from train.data.mixing.mixture_plan import MixturePlan
from train.data.mixing.stages import continued_stages, resolved_stages
from train.util.format import plural
from train.util.run_layout import RunDir


def settle_mixture(config: Config, corpus_folder: str, note: Callable[[str], None]) -> Config:
    """The configuration with its stages in steps and shares, and no more steps than its sources last.

    Of another corpus than a mixture: as it is. What a run in ``run.dir`` has read keeps its shares. Raises UserError
    where they would be others from now on and ``data.reweight`` does not say so.
    """
    if config.data.source != "mix":
        return config
    corpus = open_corpus(corpus_folder)
    stages = resolved_stages(config, {name: part.tokens for name, part in corpus.split("train").parts.items()})
    run_dir = RunDir(Path(config.run.dir or ""))
    if (step := manifest.newest_step(run_dir.checkpoints)) and run_dir.config.exists():
        old = configuration.read(run_dir.config)
        stages = continued_stages(old.data.stages, stages, step, old.steps, config.data.reweight)
    weightless = {name: source.model_copy(update={"weight": None}) for name, source in config.data.sources.items()}
    data = config.data.model_copy(update={"stages": stages, "sources": weightless})
    config = config.model_copy(update={"data": data})
    return config if data.exhausted == "repeat" else _within_sources(config, corpus, note)


def _within_sources(config: Config, corpus: Corpus, note: Callable[[str], None]) -> Config:
    """The configuration with no more steps than the sources of the mixture last."""
    from train.data.loader import RankShare, training_loader  # not at the top: torch takes the driver a second

    plan = training_loader(corpus, config, RankShare(0, 1, 1)).plan
    assert isinstance(plan, MixturePlan)
    if plan.steps is None or plan.steps >= config.steps:
        return config
    ended = ", ".join(dict.fromkeys(plan.names[source] for _, source in plan.schedule.exhausted))
    why = f"data.exhausted={config.data.exhausted}"
    note(f"the text of {ended} is read after {plural(plan.steps, 'step')}: the run ends there ({why})")
    return config.model_copy(update={"steps": plan.steps})
