"""Suggests the key that was meant, by its spelling or by its name in other systems."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

FOREIGN_NAMES = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "grad_clip": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "warmup_steps": "schedule.warmup",
    "max_steps": "steps",
    "max_iters": "steps",
    "train_iters": "steps",
    "batch_size": "batch.global",
    "global_batch_size": "batch.global",
    "micro_batch_size": "batch.micro",
    "per_device_train_batch_size": "batch.micro",
    "block_size": "batch.seq_len",
    "seq_length": "batch.seq_len",
    "max_seq_len": "batch.seq_len",
    "n_layer": "model.layers",
    "num_layers": "model.layers",
    "n_embd": "model.width",
    "hidden_size": "model.width",
    "n_head": "model.heads",
    "num_heads": "model.heads",
    "num_gpus": "cluster.workers",
    "nproc_per_node": "cluster.workers",
    "world_size": "cluster.workers",
    "num_workers": "cluster.workers",
    "zero_stage": "zero.stage",
    "output_dir": "run.dir",
    "out_dir": "run.dir",
    "eval_interval": "eval_every",
    "save_steps": "save_every",
}
"""Name of a key in other training systems -> our key."""


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Text ": did you mean ...?" with the one of ``names`` most similar to ``name``; "" where none is similar."""
    foreign = difflib.get_close_matches(name.rsplit(".", 1)[-1], FOREIGN_NAMES, 1, 0.85)
    if foreign and FOREIGN_NAMES[foreign[0]] in names:
        return f": did you mean {FOREIGN_NAMES[foreign[0]]!r}?"
    by_last = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
    match = difflib.get_close_matches(name, names, 1, 0.6) or difflib.get_close_matches(name, list(by_last), 1, 0.6)
    return f": did you mean {by_last.get(match[0], match[0])!r}?" if match else ""
