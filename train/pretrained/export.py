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

from train.config import schema
from train.data.tokenizer import FILE as TOKENIZER
from train.distributed.param_shard import MASTER
from train.errors import UserError
from train.objectives.masked import MaskedLM
from train.pretrained.hf import family_of
from train.pretrained.hf.family import Facts, HFFamily, facts_of
from train.pretrained.hf.folder import write_weights
from train.pretrained.hf.listing import CONFIG
from train.run_dir.open_run import SavedRun, load_objective, open_run
from train.util import seeding
from train.util.format import some
from train.util.io import write_whole

PROBE_ROWS, PROBE_TOKENS, NO_LIMIT = 2, 128, 1 << 30
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
    if getattr(run.config.objective, "pool", "own") == "mean":
        raise UserError(
            f"{folder} takes the mean of a row (objective.pool=mean), and no model of transformers does: train with own"
        )
    facts = facts_of(run.config.model, run.checkpoint.manifest["shapes"]["backbone.embed.weight"][0])
    family = family_of(run.config.objective.name, facts)
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(f".{to.name}.exporting-{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        _write_words(run, family, facts, aside)
        tensors, files = _write_weights(run, family, facts, aside, shard_bytes)
        tokens = _probe(run)
        _same_tokens(run, aside, tokens)
        difference, largest = _same_logits(run, aside, tokens)
        aside.replace(to)  # an empty folder gives way to it
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    step, moved = run.checkpoint.progress.step, [to / file.name for file in files]
    return Exported(family.name, transformers.__version__, step, tensors, moved, difference, largest)


SPECIAL = {
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]",),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}
"""What transformers calls the tokens of these names."""


def _write_words(run: SavedRun, family: HFFamily, facts: Facts, aside: Path) -> None:
    """All but the weights."""
    tokenizer, shapes = run.tokenizer, run.checkpoint.manifest["shapes"]
    there = {kind: name for kind, names in SPECIAL.items() for name in names if tokenizer.find(name, -1) >= 0}
    eot = tokenizer.name_of(tokenizer.eot)
    about = {"bos_token": eot, "eos_token": eot} | there
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_whole(aside / TOKENIZER, tokenizer.content.encode())
    _write_json(aside / "tokenizer_config.json", kind | {"model_max_length": facts.get("max_len", NO_LIMIT)} | about)
    more: dict[str, Any] = {"architectures": [family.architecture(shapes)]}
    more |= {
        f"{kind}_id": tokenizer.id_of(about[kind]) for kind in ("bos_token", "eos_token", "pad_token") if kind in about
    }
    if isinstance(run.config.objective, schema.Classify):
        names = run.config.objective.classes or ["score"]
        more |= {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    _write_json(aside / CONFIG, family.config(facts, run.config.model.dropout, more))


def _write_weights(
    run: SavedRun, family: HFFamily, facts: Facts, aside: Path, shard_bytes: int
) -> tuple[int, list[Path]]:
    shapes = {name: tuple(shape) for name, shape in run.checkpoint.manifest["shapes"].items()}
    places = {place.theirs: place for place in family.places(shapes.items(), facts)}

    def read(name: str) -> Tensor:
        place = places[name]
        row = math.prod(shapes[place.ours][1:])
        found = run.reader.read(place.ours, MASTER, place.start * row, place.count * row)
        return found.view(place.shape[::-1]).T if place.turned else found.view(place.shape)

    source = {
        "run": str(run.config.run.name),
        "step": str(run.checkpoint.progress.step),
        "checkpoint": run.checkpoint.digest,
    }
    return len(places), write_weights(aside, [(name, p.shape) for name, p in places.items()], read, shard_bytes, source)


def _probe(run: SavedRun) -> Tensor:
    """Tokens (rows, tokens), the same for every export of a model of this kind."""
    shape = PROBE_ROWS, min(PROBE_TOKENS, run.config.batch.seq_len)
    return torch.from_numpy(seeding.generator(0, "probe").integers(0, run.tokenizer.vocab_size, shape))


def _same_tokens(run: SavedRun, aside: Path, tokens: Tensor) -> None:
    """Raises UserError unless transformers' tokenizer makes the same of a text and of some tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(aside, local_files_only=True)
    special = set(run.tokenizer.special)  # spelled in a text they are text to us, and the token itself to transformers
    text = run.tokenizer.decode(token for token in tokens.flatten().tolist() if token not in special)
    ids = run.tokenizer.encode(text)
    if theirs.encode(text, add_special_tokens=False) != ids or theirs.decode(ids) != run.tokenizer.decode(ids):
        raise UserError("transformers reads the tokenizer of this run as another one, so nothing is exported")


@torch.no_grad()
def _same_logits(run: SavedRun, aside: Path, tokens: Tensor) -> tuple[float, float]:
    """(the largest difference, the largest logit) on the probe; raises UserError unless they are the same but for rounding.

    One model after the other: memory for one is enough.
    """
    ours = answers(load_objective(run), tokens)
    theirs, names = _load(aside)
    if wrong := [
        f"{kind.replace('_', ' ')}: {some(sorted(map(str, found)))}" for kind, found in names.items() if found
    ]:
        raise UserError(f"transformers does not find what it looks for ({'; '.join(wrong)}), so nothing is exported")
    said = theirs(tokens, **({"decoder_input_ids": tokens} if theirs.config.is_encoder_decoder else {}))
    found = [said[name] for name in ("logits", "prediction_logits", "seq_relationship_logits") if name in said]
    pairs = [(a, b[..., : a.shape[-1]]) for a, b in zip(ours, found, strict=True)]
    difference, largest = max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise UserError(
            f"transformers' logits differ from ours by {difference:.2g} where the largest is {largest:.3g}, so nothing is exported"
        )
    return difference, largest


def answers(objective: Any, tokens: Tensor) -> list[Tensor]:
    """The logits of all heads of ours, for rows that are whole."""
    places, ones = torch.arange(tokens.shape[1]).expand(tokens.shape), torch.ones(tokens.shape, dtype=torch.int32)
    batch = {"tokens": tokens, "positions": places, "segments": ones, "target_tokens": tokens, "target_segments": ones}
    found = [objective.logits(batch)]
    if isinstance(objective, MaskedLM) and objective.next_sentence:
        found.append(objective.head["next"](objective.backbone.pooler(objective.backbone(batch))))
    return found


def _load(aside: Path) -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it, in float32, and the names that it misses or did not expect."""
    architecture = getattr(transformers, json.loads((aside / CONFIG).read_text())["architectures"][0])
    model, names = architecture.from_pretrained(
        aside, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    return model.eval(), {kind: names[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
