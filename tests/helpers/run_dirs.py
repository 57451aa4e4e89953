"""Writes run and sweep folders as training leaves them, without training: for tests of their readers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from train.checkpoint import manifest
from train.config import load as configuration

BASE = configuration.to_dict(configuration.load(["model=gpt_tiny", "steps=100", "tracking=off", "precision=fp32"]))


def write_manifest(checkpoint: Path, **changes: Any) -> None:
    """Writes the manifest of a checkpoint without files into its folder, ``step_<n>``, which is made."""
    progress = {"step": int(checkpoint.name.removeprefix("step_")), "cursor": {"epoch": 0, "position": 0}}
    values = {"progress": progress, "val_loss": None, "shapes": {}, "scalars": {}, "corpus": "f" * 64, "files": {}}
    checkpoint.mkdir(parents=True)
    (checkpoint / manifest.MANIFEST).write_bytes(manifest.to_bytes(values | changes))


def write_run(folder: Path, loss: float = 3.0, lines: int = 50, finished: bool = True, **changes: Any) -> Path:
    """Writes a run whose loss falls to ``loss``; ``changes`` are configuration keys with ``__`` for a dot."""
    tree = json.loads(json.dumps(BASE))
    tree["run"] = {"name": folder.name, "dir": str(folder)}
    tree["steps"] = lines * 10
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = tree
        for section in sections:
            at = at[section]
        at[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True))
    metrics = []
    for i in range(1, lines + 1):
        now = loss + 2 * math.exp(-6 * i / lines) + 0.05 * math.sin(i)
        line = {"step": 10 * i, "loss": now, "lr": 1e-3, "grad_norm": 1.0, "tokens": 20480 * i, "tokens_per_s": 5000.0}
        metrics.append(line | ({"val_loss": now + 0.1, "bits_per_byte": now / 3} if i % 10 == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    sample = {"step": 10 * lines, "prompt": "def ", "text": "f(x):\n    return x"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "corpus.json").write_text(json.dumps({"folder": "corpora/x", "fingerprint": "f" * 64}))
    (folder / "run.json").write_text(json.dumps({"wandb_id": "ab", "starts": 2, "wall_s": 220.0}))
    if finished:
        tokens = 20480 * lines
        summary = {
            "step": 10 * lines,
            "val_loss": loss,
            "params": 120000,
            "tokens": tokens,
            "wall_s": 220.0,
            "goodput": 0.9,
            "starts": 2,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_sweep(folder: Path, trials: list[dict[str, Any]], **settings: Any) -> Path:
    """Writes a sweep as its driver leaves it. A trial has ``state``, ``params``, and ``loss`` if finished; one that is
    queued, or has ``gone``, has no folder.
    """
    about = {
        "name": folder.name,
        "sampler": "tpe",
        "trials": len(trials),
        "metric": "val_loss",
        "direction": "minimize",
    }
    spaces = settings.pop("spaces", {})
    head = {"event": "sweep", "fixed": {}, "axes": spaces, "sweep": about | {"pruner": "asha"} | settings, "grid": None}
    folder.mkdir(parents=True, exist_ok=True)
    records = [head]
    for i, trial in enumerate(trials):
        state, loss, params = trial["state"], trial.get("loss", 3.0), trial["params"]
        records.append(
            {"event": "trial", "trial": i, "params": {key: str(value) for key, value in params.items()}, "attrs": {}}
        )
        if state == "queued":
            continue
        records.append({"event": "start", "trial": i, "workers": 1, "hosts": ["here"], "t": 1.0})
        lines = 50 if state == "done" else 10
        if not trial.get("gone"):
            changes = {key.replace(".", "__"): value for key, value in params.items() if "." in key}
            write_run(
                folder / f"{i:03}",
                loss,
                lines,
                state == "done",
                run__name=f"{folder.name}-{i:03}",
                steps=500,
                **changes,
            )
        if state != "cut off":
            end = {"state": state, "step": 10 * lines, "values": trial.get("values"), "why": trial.get("why", "")}
            records.append({"event": "end", "trial": i, **end, "t": 2.0})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
