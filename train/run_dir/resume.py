"""Resuming: whether the run in a folder is complete, and whether a configuration may continue it.

Imports no torch: the driver asks before anything is started.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from train.checkpoint import manifest
from train.config import load as configuration
from train.config.schema import Config
from train.errors import UserError
from train.util.reading import UNREADABLE, as_object, read_yaml
from train.util.redact import redact_tree
from train.util.run_layout import RunDir, checkpoint_steps

IDENTITY = ("model.", "objective.", "data.", "batch.global", "batch.ramp", "batch.seq_len", "seed", "optimizer.name")
"""Keys that identify a run: a run with other values is another run."""
BEGINNING = ("init.", "stop.metric")
"""Keys that are fixed once a run has logged or saved; before, a start that failed may be repeated with others."""
INCIDENTAL = (
    *("data.dir", "data.workers", "data.paths", "model.checkpoint_activations", "model.checkpoint_blocks"),
    *("data.stages", "data.reweight"),
)
"""Keys among them that may change, since they do not affect the result: the corpus is identified by its fingerprint."""


def check_resumable(config: Config, corpus_fingerprint: str | None) -> list[str]:
    """Changes of the configuration since the run in ``run.dir`` was last started, a line a key; empty for a new run.

    ``corpus_fingerprint`` is None before the corpus is known; the keys are compared all the same.

    Raises UserError where going on would train something else under the same name.
    """
    folder = Path(config.run.dir or "")
    run_dir = RunDir(folder)
    saved = run_dir.config
    if not saved.exists():
        return []
    old = read_yaml(saved, "Restore it, or choose another run.dir", as_object)
    changes = list(configuration.differences(old, redact_tree(configuration.to_dict(config))))
    begun = manifest.newest_step(run_dir.checkpoints) > 0 or run_dir.metrics.exists()
    kept = IDENTITY + BEGINNING if begun else IDENTITY
    refused = [c for c in changes if c[0].startswith(kept) and not _may_change(c[0], config)]
    if refused:
        lines = "\n".join(f"  - {key}: {was!r} there, {now!r} here" for key, was, now in refused)
        raise UserError(
            f"{folder} holds a run of another kind:\n{lines}\n"
            "Give the old values to go on with it, or another run.name to start anew"
        )
    for step in checkpoint_steps(run_dir.checkpoints):
        with contextlib.suppress(manifest.DamagedCheckpoint):
            was = manifest.read(run_dir.checkpoint(step))["corpus"]
            if corpus_fingerprint is not None:
                require_same_corpus(folder, was, corpus_fingerprint)
    return [f"{key}: {was} -> {now}" for key, was, now in changes]


def _may_change(key: str, config: Config) -> bool:
    """Whether a key that identifies a run may change: it does not affect the result, or is judged elsewhere.

    Shares of a mixture are, once its corpora are known: see ``mixture_stages``.
    """
    if not key.startswith("data.sources."):
        return key in INCIDENTAL
    read = config.data.exhausted == "repeat" and key.endswith((".epochs", ".tokens"))
    return read or key.endswith((".dir", ".paths", ".weight"))


def require_same_corpus(folder: Path, was: str, now: str) -> None:
    """Raise UserError unless the fingerprint of a checkpoint's corpus is that of the corpus now."""
    if was != now:
        raise UserError(
            f"{folder} was trained on the corpus {was[:12]}, and this one is {now[:12]}: the text, its "
            "cleaning or its tokenizer changed. Restore them to go on, or take another run.name to start anew"
        )


class _SummaryForm(BaseModel):
    step: int
    stale: int = 0
    time_by_cause: dict[str, float] = {}
    tokens_per_s: float | None = None
    tokens_per_s_per_worker: float | None = None


def finished_summary(config: Config) -> dict[str, Any] | None:
    """The summary of the run in ``run.dir`` if it has made all its steps or was stopped early; else None."""
    with contextlib.suppress(*UNREADABLE):
        content = json.loads(RunDir(Path(config.run.dir or "")).summary.read_bytes())
        summary = _SummaryForm.model_validate(content)
        if summary.step >= config.steps or 0 < config.stop.patience <= summary.stale:
            return dict(content)
    return None
