"""A run as a folder that transformers loads, proved before it has its name: the only file that knows transformers.

Weights go from the pieces of the checkpoint to the files a tensor at a time, whatever world and ZeRO stage wrote them. Then
transformers loads what was written, and its names, its tokens and its logits on a probe must be ours.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its import: a folder of ours is nobody else's business

import torch
import transformers
from torch import Tensor

from train import rng
from train.data.files import write_whole
from train.data.tokenizer import FILE as TOKENIZER
from train.errors import UserError
from train.hf import family_of
from train.hf.family import Facts, Family, facts_of
from train.hf.folder import CONFIG, write_weights
from train.pieces import MASTER
from train.saved import SavedRun, load_objective, open_run
from train.words import some

PROBE_ROWS, PROBE_TOKENS = 2, 128
TOLERANCE = 1e-5
"""Of the largest logit, or of 1 where that is less: what float32 may differ by where sums are made in another order."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees."""

    family: str
    version: str
    """Of the transformers that it was proved with."""
    step: int
    tensors: int
    files: list[Path]
    difference: float
    """The largest difference of a logit of the probe."""
    largest: float
    """The largest logit."""


def export(folder: Path, to: Path, which: str, shard_bytes: int) -> Exported:
    """Write checkpoint ``which`` of the run in ``folder`` to the folder ``to``, which is new or empty.

    No file is larger than ``shard_bytes``, unless it holds one tensor. Raises UserError where transformers has no such model, and
    where what it loads is not the same model: then nothing is left behind.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to={to} is there and is not empty: name a new folder, or empty that one")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it finds wrong is said here
    run = open_run(folder, which)
    facts = facts_of(run.config.model, run.checkpoint.manifest["shapes"]["backbone.embed.weight"][0])
    family = family_of(run.config.objective.name, facts)
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(f".{to.name}.exporting-{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        _write_words(run, folder, family, facts, aside)
        tensors, files = _write_weights(run, family, facts, aside, shard_bytes)
        tokens = _probe(run)
        _same_tokens(run, aside, tokens)
        difference, largest = _same_logits(run, family, aside, tokens)
        aside.replace(to)  # an empty folder gives way to it
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    step, moved = run.checkpoint.progress.step, [to / file.name for file in files]
    return Exported(family.name, transformers.__version__, step, tensors, moved, difference, largest)


def _write_words(run: SavedRun, folder: Path, family: Family, facts: Facts, aside: Path) -> None:
    """All but the weights."""
    tokenizer = run.tokenizer
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["max_len"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.eot_token,
        "eos_token": tokenizer.eot_token,
    }
    write_whole(aside / TOKENIZER, (folder / TOKENIZER).read_bytes())
    _write_json(aside / "tokenizer_config.json", about)
    config = family.config(facts, run.config.model.dropout, tokenizer.eot)
    _write_json(aside / CONFIG, config)


def _write_weights(run: SavedRun, family: Family, facts: Facts, aside: Path, shard_bytes: int) -> tuple[int, list[Path]]:
    shapes = {name: tuple(shape) for name, shape in run.checkpoint.manifest["shapes"].items()}
    places = {place.theirs: place for place in family.places(shapes.items(), facts)}

    def read(name: str) -> Tensor:
        place = places[name]
        row = math.prod(shapes[place.ours][1:])
        found = run.reader.read(place.ours, MASTER, place.start * row, place.count * row)
        return found.view(place.shape[::-1]).T if place.turned else found.view(place.shape)

    source = {"run": str(run.config.run.name), "step": str(run.checkpoint.progress.step), "checkpoint": run.checkpoint.digest}
    return len(places), write_weights(aside, [(name, p.shape) for name, p in places.items()], read, shard_bytes, source)


def _probe(run: SavedRun) -> Tensor:
    """Tokens (rows, tokens), the same for every export of a model of this kind."""
    shape = PROBE_ROWS, min(PROBE_TOKENS, run.config.batch.seq_len)
    return torch.from_numpy(rng.generator(0, "probe").integers(0, run.tokenizer.vocab_size, shape))


def _same_tokens(run: SavedRun, aside: Path, tokens: Tensor) -> None:
    """Raises UserError unless transformers' tokenizer makes the same of a text and of some tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(aside, local_files_only=True)
    text = run.tokenizer.decode(tokens.flatten().tolist())
    for special in theirs.all_special_tokens:  # spelled in a text they are text to us, and the token itself to transformers
        text = text.replace(special, "")
    ids = run.tokenizer.encode(text)
    if theirs.encode(text, add_special_tokens=False) != ids or theirs.decode(ids) != run.tokenizer.decode(ids):
        raise UserError("transformers reads the tokenizer of this run as another one, so nothing is exported")


@torch.no_grad()
def _same_logits(run: SavedRun, family: Family, aside: Path, tokens: Tensor) -> tuple[float, float]:
    """(the largest difference, the largest logit) on the probe; raises UserError unless they are the same but for rounding.

    One model after the other: memory for one is enough.
    """
    shape = tokens.shape
    places = {"positions": torch.arange(shape[1]).expand(shape), "segments": torch.ones(shape, dtype=torch.int32)}
    ours = load_objective(run).logits({"tokens": tokens, **places})
    theirs, names = _load(family, aside)
    if wrong := [f"{kind.replace('_', ' ')}: {some(sorted(map(str, found)))}" for kind, found in names.items() if found]:
        raise UserError(f"transformers does not find what it looks for ({'; '.join(wrong)}), so nothing is exported")
    logits = theirs(tokens).logits[..., : run.tokenizer.vocab_size]
    difference, largest = float((logits - ours).abs().max()), float(ours.abs().max())
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise UserError(
            f"transformers' logits differ from ours by {difference:.2g} where the largest is {largest:.3g}, so nothing is exported"
        )
    return difference, largest


def _load(family: Family, aside: Path) -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it, in float32, and the names that it misses or did not expect."""
    architecture = getattr(transformers, family.architecture)
    model, names = architecture.from_pretrained(aside, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    return model.eval(), {kind: names[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
