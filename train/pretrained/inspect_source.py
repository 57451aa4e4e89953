"""Identifies what ``init.from`` names and compares its configuration with the run's.

Of weights only the headers are read, and a head that may be the embedding is compared with it. So the driver checks
before it starts anything; the ranks use the same functions again.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint import manifest
from train.config import load as configuration
from train.config.schema import Config
from train.errors import UserError
from train.pretrained.hf import family_of_config
from train.pretrained.hf.family import ArchKeys, HFFamily, arch_keys, yaml_text
from train.pretrained.hf.listing import CONFIG_FILE, FETCH_AGAIN, pickled_files, read_headers
from train.util.format import some
from train.util.reading import read_object, reading
from train.util.run_layout import RunDir

SHAPE_ONLY_KEYS = ("vocab_size", "max_len")
"""Architecture keys that change nothing but the shapes of parameters."""


@dataclass(frozen=True)
class SourceDescription:
    """A model that a run may start from: a checkpoint of a run, or a Hugging Face folder."""

    kind: str
    """For messages: "a run, step 800" or "Hugging Face, Llama"."""
    objective: str
    arch: ArchKeys
    manifest: dict[str, Any] | None = None
    """Manifest of the checkpoint, where the source is a run."""
    family: HFFamily | None = None
    """Family of the model, where the source is a Hugging Face folder."""


def describe_source(folder: Path, which: str) -> SourceDescription:
    """Identify the model in ``folder``; of a run, its checkpoint ``which``: "latest", "best" or a step.

    Raises UserError for a folder that is neither a run nor has safetensors, or a model that is not one of ours.
    """
    run_dir = RunDir(folder)
    if run_dir.config.exists():
        config = configuration.read(run_dir.config)
        manifests = manifest.read_manifests(run_dir.checkpoints)[0]
        chosen = manifests[manifest.select(manifests, which, folder)]
        with reading(run_dir.checkpoint(chosen["progress"]["step"]), "Choose another with init.checkpoint=<step>"):
            arch = arch_keys(config.model, chosen["shapes"]["backbone.embed.weight"][0])
        kind = f"a run, step {chosen['progress']['step']}"
        return SourceDescription(kind, config.objective.name, arch, manifest=chosen)
    if (folder / CONFIG_FILE).exists():
        hf_config = read_object(folder / CONFIG_FILE, FETCH_AGAIN)
        family = family_of_config(hf_config, str(folder / CONFIG_FILE))
        with reading(folder / CONFIG_FILE, FETCH_AGAIN):
            arch, unsupported = family.from_hf_config(hf_config)
            objective = family.objective(hf_config)
        if unsupported:
            listed = "; ".join(unsupported)
            raise UserError(f"{folder / CONFIG_FILE} describes a model that is not one of ours: {listed}")
        tied = family.is_tied(arch["tied"], hf_config, folder, read_headers(folder))
        if tied != arch["tied"] and family.tied_scales:
            says, say = ("is", "is not") if arch["tied"] else ("is not", "is")
            raise UserError(
                f"{folder / CONFIG_FILE} and the weights disagree: tie_word_embeddings says that {family.head_matrix} "
                f"{says} the embedding, and they say that it {say}. "
                f"Of {family.name} it also says whether the output is scaled: set it right in {CONFIG_FILE}"
            )
        arch["tied"] = tied
        kind = f"Hugging Face, {family.name}"
        if pickled := pickled_files(folder):
            kind += f"; {some(pickled)} not read, only safetensors are"
        return SourceDescription(kind, objective, arch, family=family)
    kinds = f"a run (which has a config.yaml) or of a Hugging Face model (which has a {CONFIG_FILE})"
    where = f"looked on {socket.gethostname()} from {Path.cwd()}"
    if folder.is_dir():
        raise UserError(f"init.from={folder} is not the folder of {kinds}; {where}")
    if folder.exists():
        raise UserError(f"init.from={folder} is a file: name the folder of {kinds}; {where}")
    raise UserError(
        f"init.from={folder} does not exist ({where}): name the folder of {kinds}, by a path that every worker sees"
    )


def list_differences(source: SourceDescription, config: Config, rows: int, shapes_differ: bool) -> list[str]:
    """List the architecture keys in which ``source`` differs from ``config``, and the overrides that remove it.

    ``rows`` is the number of rows of the run's embedding. Unless ``shapes_differ``, keys that only change shapes are
    ignored.
    """
    arch, same_objective = arch_keys(config.model, rows), source.objective == config.objective.name
    ignored = {*(() if same_objective else ("tied",)), *(() if shapes_differ else SHAPE_ONLY_KEYS)}
    other = {key: value for key, value in source.arch.items() if arch.get(key) != value and key not in ignored}
    if not other:
        return []
    listed = [
        f"model.{key} is {yaml_text(arch.get(key))} here, {yaml_text(value)} there" for key, value in other.items()
    ]
    overrides = " ".join(f"model.{key}={yaml_text(value)}" for key, value in other.items())
    return [*listed, f"to have what is there: {overrides}"]


def mismatch_error(config: Config, source: SourceDescription, problems: Sequence[str]) -> UserError:
    """The error that lists every reason why ``source`` does not fit the run."""
    listed = "".join(f"\n  - {problem}" for problem in problems)
    return UserError(f"init.from={config.init.from_} ({source.kind}) does not fit this run:{listed}")


def check_source(config: Config) -> None:
    """Raise UserError where a new run's ``init.from`` does not exist or holds another model than the run's.

    Not checked for a run that has checkpoints, since it does not read ``init.from`` again, nor for one with a mirror,
    since the driver cannot tell whether that holds some.
    """
    begun = manifest.newest_step(RunDir(Path(config.run.dir or "")).checkpoints) > 0
    if not config.init.from_ or config.save_mirror or begun:
        return
    source = describe_source(Path(config.init.from_), str(config.init.checkpoint))
    if problems := list_differences(source, config, rows=0, shapes_differ=False):
        raise mismatch_error(config, source, problems)
