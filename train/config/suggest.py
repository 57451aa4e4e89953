"""Suggests what was meant: a key by its spelling or by its name in other systems, a value by its quotes."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence

from train.config.text_keys import quoted

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
    "zero_stage": "zero.stage",
    "output_dir": "run.dir",
    "out_dir": "run.dir",
    "eval_interval": "eval_every",
    "save_steps": "save_every",
}
"""Name of a key in other training systems -> our key."""
OF_SEVERAL = "num_workers"
"""What others call the processes that load batches, of which there are none here: it may mean two of our keys."""


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Text ": did you mean ...?" with the one of ``names`` most similar to ``name``; "" where none is similar."""
    if name.rsplit(".", 1)[-1].endswith(OF_SEVERAL) and "cluster.workers" in names:
        return (
            ": cluster.workers is how many ranks train, and data.workers how many processes prepare the text; "
            "batches need none, a thread of each rank reads them ahead"
        )
    foreign = difflib.get_close_matches(name.rsplit(".", 1)[-1], FOREIGN_NAMES, 1, 0.85)
    if foreign and FOREIGN_NAMES[foreign[0]] in names:
        return f": did you mean {FOREIGN_NAMES[foreign[0]]!r}?"
    by_last = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
    match = difflib.get_close_matches(name, names, 1, 0.6) or difflib.get_close_matches(name, list(by_last), 1, 0.6)
    return f": did you mean {by_last.get(match[0], match[0])!r}?" if match else ""


def one_value_wanted(key: str, text: str, kind: str | None) -> str:
    """The problem of an override with several values in a command that takes one; ``kind`` as of ``text_keys``."""
    problem = f"{text!r} asks for a sweep, and this command runs one job: give one value, or -m for a run each"
    value = text.partition("=")[2]
    if kind == "list":
        return f"{problem}; a list of them is {shlex.quote(f'{key}=[{value}]')}"
    return problem if kind is None else f"{problem}; where the comma is part of it, {quoted(key, value)}"


def unreadable(text: str, key: str, names: Sequence[str]) -> str:
    """The problem of an override that Hydra cannot read, of a key that does not exist or that is a section."""
    without_dashes = text.lstrip("-")
    if text != without_dashes and without_dashes.partition("=")[0] in names:
        meant = without_dashes if "=" in text else f"{without_dashes}=..."
        return f"{text!r} is not key=value: keys have no dashes here, as in {meant}"
    if "=" not in text:
        return f"{text!r} is not key=value or group=choice"
    if key not in names:
        return f"unknown key {key!r}{did_you_mean(key, names)}"
    return f"{text!r} cannot be read: set the keys of {key} one by one, as in {key}.KEY=..."
