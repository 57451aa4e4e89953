"""Finds the prepared corpus of a run, or prepares it; refuses a run that could not go on with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from train.config.schema import Config, DataConfig
from train.data.corpus import shards
from train.data.mixing.mixture_corpus import open_corpus
from train.data.mixing.prepare_sources import prepare_mixture
from train.data.prepare import prepare
from train.data.tokenizer import load_tokenizer
from train.events import NoteEvent, PrepareEvent
from train.generation.prompts import check_given
from train.pretrained import inspect_source
from train.run_dir import resume


def find_corpus(config: Config, report: Callable[[dict[str, Any]], None]) -> str:
    """The folder of the prepared corpus, which is prepared first where it is missing or old.

    ``report`` gets the events of the preparation. UserError where the run in ``run.dir`` cannot go on with this
    configuration or this corpus, or where a new run cannot start from what ``init.from`` names.
    """
    resume.check_resumable(config, None)
    inspect_source.check_source(config)
    check = partial(check_given, config)

    def report_progress(progress: dict[str, Any]) -> None:
        noted = progress["phase"] == "note"
        event = NoteEvent(progress["text"]) if noted else PrepareEvent(progress["phase"], progress)
        report(event.to_json())

    def find_or_prepare(data: DataConfig) -> Path:
        ready = prepare.find_prepared(data)
        if ready is None:
            return prepare.prepare(data, report_progress, config.objective, check)
        check(load_tokenizer(ready))
        return ready

    if config.data.source == "mix":
        ready = prepare_mixture(config.data, find_or_prepare)
        check(open_corpus(ready).tokenizer)
        resume.check_resumable(config, open_corpus(ready).fingerprint)
    else:
        ready = find_or_prepare(config.data)
        resume.check_resumable(config, shards.fingerprint(shards.read_index(ready)))
    return str(ready.absolute())
