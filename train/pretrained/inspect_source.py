"""What ``init.from`` names, as far as words tell: manifests, configurations, names of files.

Light on purpose: no weights are opened, so the driver looks before anything is started; every rank looks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint import manifest
from train.config import load as configuration
from train.config.schema import Config
from train.errors import UserError
from train.pretrained.hf import family_named
from train.pretrained.hf.family import Facts, HFFamily, facts_of, word
from train.pretrained.hf.listing import CONFIG, read_json, weight_files
from train.util.run_layout import RunDir

ONLY_SHAPES = ("vocab_size", "max_len")
"""Facts that change nothing but the shapes of parameters."""


@dataclass(frozen=True)
class SourceDescription:
    """A model that a run may start from."""

    kind: str
    """In words."""
    objective: str
    facts: Facts
    manifest: dict[str, Any] | None = None
    """Of the checkpoint, where it is a run."""
    family: HFFamily | None = None
    """Where it is a Hugging Face folder."""


def describe(folder: Path, which: str) -> SourceDescription:
    """What ``folder`` holds; of a run, the checkpoint ``which``: "latest", "best" or a step.

    Raises UserError for a folder that holds neither a run nor safetensors, or a model that is not one of ours.
    """
    run_dir = RunDir(folder)
    if run_dir.config.exists():
        config = configuration.read(run_dir.config)
        found = manifest.read_manifests(run_dir.checkpoints)[0]
        chosen = found[manifest.select(found, which, folder)]
        facts = facts_of(config.model, chosen["shapes"]["backbone.embed.weight"][0])
        return SourceDescription(
            f"a run, step {chosen['progress']['step']}", config.objective.name, facts, manifest=chosen
        )
    if (folder / CONFIG).exists():
        there = read_json(folder / CONFIG)
        family = family_named(there, str(folder / CONFIG))
        facts, strange = family.facts(there)
        if strange:
            raise UserError(f"{folder / CONFIG} describes a model that is not one of ours: {'; '.join(strange)}")
        weight_files(folder)
        return SourceDescription(f"Hugging Face, {family.name}", family.objective(there), facts, family=family)
    raise UserError(
        f"init.from={folder} {'is' if folder.is_dir() else 'is not there; it must be'} "
        f"neither a run (which has a config.yaml) nor a Hugging Face folder (which has a {CONFIG}), "
        f"or not every worker sees it (looked from {Path.cwd()})"
    )


def other_facts(there: SourceDescription, config: Config, rows: int, shapes_differ: bool) -> list[str]:
    """What makes the model there another one than that of ``config`` with ``rows`` tokens, key by key, and what to give for it.

    Where no shape differs, what only shapes depend on does not matter.
    """
    here, same = facts_of(config.model, rows), there.objective == config.objective.name
    other = {key: value for key, value in there.facts.items() if here.get(key) != value and (same or key != "tied")}
    if not shapes_differ:
        other = {key: value for key, value in other.items() if key not in ONLY_SHAPES}
    if not other:
        return []
    found = [f"model.{key} is {word(here.get(key))} here, {word(value)} there" for key, value in other.items()]
    return [*found, "to have what is there: " + " ".join(f"model.{key}={word(value)}" for key, value in other.items())]


def misfit(config: Config, there: SourceDescription, problems: Sequence[str]) -> UserError:
    """The refusal of what does not fit, all of it."""
    listed = "".join(f"\n  - {problem}" for problem in problems)
    return UserError(f"init.from={config.init.from_} ({there.kind}) does not fit this run:{listed}")


def check(config: Config) -> None:
    """Raises UserError where a new run would start from what is not there, or from another model than its own.

    A run that has checkpoints does not look there again; nor can it be told here whether a mirror has some.
    """
    begun = manifest.newest_step(RunDir(Path(config.run.dir or "")).checkpoints) > 0
    if not config.init.from_ or config.save_mirror or begun:
        return
    there = describe(Path(config.init.from_), str(config.init.checkpoint))
    if problems := other_facts(there, config, rows=0, shapes_differ=False):
        raise misfit(config, there, problems)
