"""What a run's folder says of the runs before: whether they are done, and whether this configuration may go on from them.

Light on purpose: the driver asks before anything is started.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

from train.checkpoint import manifest
from train.config import load as configuration
from train.config.schema import Config
from train.errors import UserError
from train.util.redact import redact_tree
from train.util.run_layout import RunDir, checkpoint_steps

IDENTITY = ("model.", "objective.", "data.", "batch.global", "batch.seq_len", "seed", "optimizer.name")
"""Keys that make a run what it is; a run with other values is another run."""
BEGINNING = ("init.", "stop.metric")
"""Keys that join them once a run has begun: a start that was refused for them may be given others."""
INCIDENTAL = ("data.dir", "data.workers", "data.paths", "model.checkpoint_activations")
"""Among them, keys that change nothing of what is trained: the corpus itself is known by its fingerprint."""


def check_resumable(config: Config, corpus_fingerprint: str | None) -> list[str]:
    """What has changed since the run in ``run.dir`` was last started, a line a key; nothing if it is new.

    ``corpus_fingerprint`` is None before the corpus is known; the keys can be looked at even so.

    Raises UserError where going on would train something else under the same name.
    """
    folder = Path(config.run.dir or "")
    run_dir = RunDir(folder)
    saved = run_dir.config
    if not saved.exists():
        return []
    try:
        old = yaml.safe_load(saved.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{saved} cannot be read ({error}): restore it, or choose another run.dir") from error
    changes = list(configuration.differences(old, redact_tree(configuration.to_dict(config))))
    begun = manifest.newest_step(run_dir.checkpoints) > 0 or run_dir.metrics.exists()
    kept = IDENTITY + BEGINNING if begun else IDENTITY
    refused = [c for c in changes if c[0].startswith(kept) and c[0] not in INCIDENTAL]
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


def require_same_corpus(folder: Path, was: str, now: str) -> None:
    """Raises UserError where a checkpoint comes from another corpus, by its fingerprint."""
    if was != now:
        raise UserError(
            f"{folder} was trained on the corpus {was[:12]}, and this one is {now[:12]}: the text, its "
            "cleaning or its tokenizer changed. Restore them to go on, or take another run.name to start anew"
        )


def finished_summary(config: Config) -> dict[str, Any] | None:
    """The summary of the run in ``run.dir`` if it has made all its steps, or enough of them."""
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(RunDir(Path(config.run.dir or "")).summary.read_text())
        if summary["step"] >= config.steps or 0 < config.stop.patience <= summary.get("stale", 0):
            return dict(summary)
    return None
