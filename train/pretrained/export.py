"""Exports a run as a folder that transformers loads, and verifies it with transformers.

Weights go from the checkpoint's shards to the files one tensor at a time, whatever world size and ZeRO stage wrote
them. Then transformers loads the folder, and its parameter names, its tokenizer and its logits on a probe must equal
ours, as must the tokens around a text and those that its ``generate`` writes. No other module imports transformers.
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

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here may reach the network

import torch
import transformers
from torch import Tensor

from train.config import schema
from train.data.tokenizer import FILE as TOKENIZER
from train.distributed.param_shard import MASTER
from train.errors import UserError
from train.objectives.masked import MaskedLM
from train.pretrained.hf import find_family
from train.pretrained.hf.family import ArchKeys, HFFamily, arch_keys
from train.pretrained.hf.folder import write_weights
from train.pretrained.hf.listing import CONFIG_FILE
from train.run_dir.open_run import SavedRun, load_objective, open_run
from train.util import seeding
from train.util.format import some
from train.util.io import to_json, write_whole

PROBE_ROWS, PROBE_TOKENS, UNLIMITED_LENGTH = 2, 128, 1 << 30
PROMPT_TOKENS = 16
GENERATIVE = ("causal", "seq2seq")
"""Objectives whose models write text."""
TOLERANCE = 1e-5
"""Largest difference of logits, relative to the larger of the largest logit and 1: float32 sums in another order."""
_NOT_EXPORTED = (
    "so nothing is exported. The run is as it was, and `generate` and `evaluate` read it. "
    "Try the transformers that requirements.lock names, or another checkpoint=<step>"
)
"""The end of a message about an export that failed its proof."""


@dataclass(frozen=True)
class ExportReport:
    """Files of a finished export, and how closely transformers' logits agree with ours."""

    family: str
    version: str
    """Version of transformers that verified it."""
    step: int
    tensors: int
    files: list[Path]
    difference: float
    """Largest difference of a logit on the probe."""
    largest: float
    """Largest absolute logit on the probe."""


def export(folder: Path, to: Path, which: str, shard_bytes: int) -> ExportReport:
    """Write checkpoint ``which`` of the run in ``folder`` to the folder ``to``, which must be new or empty.

    No weight file is larger than ``shard_bytes``, unless it holds a single tensor. Raises UserError where transformers
    has no such model, and where the model it loads differs from ours: then nothing is left behind.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to={to} is there and is not empty: name a new folder, or empty that one")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its warnings about keys are errors of ours, raised below
    run = open_run(folder, which)
    if getattr(run.config.objective, "pool", "own") == "mean":
        raise UserError(
            f"{folder} takes the mean of a row (objective.pool=mean), and no model of transformers does: train with own"
        )
    arch = arch_keys(run.config.model, run.checkpoint.manifest["shapes"]["backbone.embed.weight"][0])
    family = find_family(run.config.objective.name, arch)
    to.parent.mkdir(parents=True, exist_ok=True)
    staging = to.with_name(f".exporting-{secrets.token_hex(4)}")  # short: ``to`` may be as long as a name can be
    staging.mkdir()
    try:
        _write_configs(run, family, arch, staging)
        tensors, files = _write_weights(run, family, arch, staging, shard_bytes)
        tokens = _probe_tokens(run)
        _check_tokenizer(run, staging, tokens)
        difference, largest = _check_model(run, staging, tokens)
        staging.replace(to)  # replaces an empty folder too
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    step, moved = run.checkpoint.progress.step, [to / file.name for file in files]
    return ExportReport(family.name, transformers.__version__, step, tensors, moved, difference, largest)


SPECIAL_TOKENS = {
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]",),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}
"""transformers' name for the role of a token -> texts of our tokens that have the role."""


def _write_configs(run: SavedRun, family: HFFamily, arch: ArchKeys, staging: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and config.json; generation_config.json where it writes text."""
    tokenizer, shapes = run.tokenizer, run.checkpoint.manifest["shapes"]
    eot = tokenizer.name_of(tokenizer.eot)
    special = {"bos_token": eot, "eos_token": eot}
    for role, texts in SPECIAL_TOKENS.items():
        for text in texts:
            if tokenizer.find(text, -1) >= 0:
                special[role] = text
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    max_length = {"model_max_length": arch.get("max_len", UNLIMITED_LENGTH)}
    name, inputs = run.config.objective.name, ["input_ids", "attention_mask"]
    settings |= {"model_input_names": [*inputs, "token_type_ids"] if name in ("masked", "classify") else inputs}
    if name == "causal":  # rows of a batch go on at their right end, and what fills their left end counts for nothing
        settings |= {"padding_side": "left", "pad_token": eot}
    write_whole(staging / TOKENIZER, tokenizer.wrapped(*_around_text(run)).encode())
    _write_json(staging / "tokenizer_config.json", settings | max_length | special)
    extra: dict[str, Any] = {"architectures": [family.hf_class(shapes)]}
    for role in ("bos_token", "eos_token", "pad_token"):
        if role in special:
            extra[f"{role}_id"] = tokenizer.id_of(special[role])
    if isinstance(run.config.objective, schema.Classify):
        labels = dict(enumerate(run.config.objective.classes or ["score"]))
        extra |= {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
    config = family.to_hf_config(arch, run.config.model.dropout, extra)
    _write_json(staging / CONFIG_FILE, config)
    if name in GENERATIVE:
        generation = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "decoder_start_token_id")}
        generation |= {"pad_token_id": config.get("pad_token_id", tokenizer.eot)}
        generation |= {"suppress_tokens": list(range(tokenizer.vocab_size, arch["vocab_size"])) or None}
        _write_json(staging / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _around_text(run: SavedRun) -> tuple[list[str], list[str]]:
    """The tokens that stand before and after a text where the model reads it, as in training."""
    tokenizer = run.tokenizer
    eot = tokenizer.name_of(tokenizer.eot)
    match run.config.objective.name:
        case "causal":
            return [eot], []
        case "seq2seq":
            return [], [eot]
        case _:
            first, last = (tokenizer.name_of(tokenizer.find(name, tokenizer.eot)) for name in ("[CLS]", "[SEP]"))
            return [first], [last]


def _write_weights(
    run: SavedRun, family: HFFamily, arch: ArchKeys, staging: Path, shard_bytes: int
) -> tuple[int, list[Path]]:
    """Write the weights; returns the number of tensors, and the files."""
    shapes = {name: tuple(shape) for name, shape in run.checkpoint.manifest["shapes"].items()}
    slices = {part.hf_name: part for part in family.slices(shapes.items(), arch)}

    def read(hf_name: str) -> Tensor:
        part = slices[hf_name]
        row_numel = math.prod(shapes[part.name][1:])
        tensor = run.reader.read(part.name, MASTER, part.start * row_numel, part.count * row_numel)
        return tensor.view(part.hf_shape[::-1]).T if part.transposed else tensor.view(part.hf_shape)

    metadata = {
        "run": str(run.config.run.name),
        "step": str(run.checkpoint.progress.step),
        "checkpoint": run.checkpoint.digest,
    }
    tensors = [(hf_name, part.hf_shape) for hf_name, part in slices.items()]
    return len(tensors), write_weights(staging, tensors, read, shard_bytes, metadata)


def _probe_tokens(run: SavedRun) -> Tensor:
    """Random tokens (rows, tokens), the same for every export with the same vocabulary size and row length."""
    shape = PROBE_ROWS, min(PROBE_TOKENS, run.config.batch.seq_len)
    return torch.from_numpy(seeding.generator(0, "probe").integers(0, run.tokenizer.vocab_size, shape))


def _text_of(run: SavedRun, tokens: Tensor) -> str:
    """The text of some tokens, without special ones: spelled in a text they are text to us, but not to transformers."""
    special = set(run.tokenizer.special)
    return run.tokenizer.decode(token for token in tokens.tolist() if token not in special)


def _check_tokenizer(run: SavedRun, staging: Path, tokens: Tensor) -> None:
    """Raise UserError unless transformers' tokenizer encodes and decodes the probe's text as ours does."""
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(staging, local_files_only=True)
    text = _text_of(run, tokens.flatten())
    ids = run.tokenizer.encode(text)
    before, after = (list(map(run.tokenizer.id_of, part)) for part in _around_text(run))
    same_ids = hf_tokenizer.encode(text, add_special_tokens=False) == ids
    if not same_ids or hf_tokenizer.decode(ids) != run.tokenizer.decode(ids):
        raise UserError(f"transformers reads the tokenizer of this run as another one, {_NOT_EXPORTED}")
    if hf_tokenizer(text)["input_ids"] != [*before, *ids, *after]:
        raise UserError(f"transformers puts other tokens around a text than training did, {_NOT_EXPORTED}")


@torch.no_grad()
def _check_model(run: SavedRun, staging: Path, tokens: Tensor) -> tuple[float, float]:
    """(Largest difference, largest logit) on the probe. Raises UserError unless logits agree within ``TOLERANCE``, and
    unless each token that transformers' ``generate`` writes is the likeliest to us.

    The models are loaded one after the other, so memory for one is enough.
    """
    theirs, prompt, written = _run_exported(run, staging, tokens)
    objective = load_objective(run)
    pairs = [(a, b[..., : a.shape[-1]]) for a, b in zip(head_logits(objective, tokens), theirs, strict=True)]
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    largest = max(float(a.abs().max()) for a, _ in pairs)
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise UserError(
            f"transformers' logits differ from ours by {difference:.2g} where the largest is {largest:.3g}, "
            f"{_NOT_EXPORTED}"
        )
    if written:
        logits = _logits_of_text(objective, run, prompt, written)
        behind = logits.max(-1).values - logits.gather(-1, torch.tensor(written)[:, None])[:, 0]
        if not float(behind.max()) <= TOLERANCE * max(float(logits.abs().max()), 1.0):
            raise UserError(f"transformers' generate writes another text than this run, {_NOT_EXPORTED}")
    return difference, largest


def _run_exported(run: SavedRun, staging: Path, tokens: Tensor) -> tuple[list[Tensor], list[int], list[int]]:
    """transformers' logits of the probe; and the tokens of a text, with those that it writes greedily after them.

    These are as a user gets them: by the tokenizer's default call and ``generate``. UserError where weights lack.
    """
    model, loading_problems = _load_exported(staging)
    listed = []
    for problem, names in loading_problems.items():
        if names:
            listed.append(f"{problem.replace('_', ' ')}: {some(sorted(map(str, names)))}")
    if listed:
        raise UserError(f"transformers does not find what it looks for ({'; '.join(listed)}), {_NOT_EXPORTED}")
    output = model(tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}))
    theirs = [output[name] for name in ("logits", "prediction_logits", "seq_relationship_logits") if name in output]
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(staging, local_files_only=True)
    max_len = getattr(run.config.model, "max_len", UNLIMITED_LENGTH)
    inputs = hf_tokenizer(_text_of(run, tokens[0, : min(PROMPT_TOKENS, max_len // 8)]), return_tensors="pt")
    prompt: list[int] = inputs["input_ids"][0].tolist()
    room = max_len - len(prompt)
    if run.config.objective.name not in GENERATIVE or room < 1:
        return theirs, prompt, []
    made = model.generate(**inputs, do_sample=False, max_new_tokens=min(PROMPT_TOKENS, room))[0].tolist()
    return theirs, prompt, made[1:] if model.config.is_encoder_decoder else made[len(prompt) :]


def _logits_of_text(objective: Any, run: SavedRun, prompt: list[int], written: list[int]) -> Tensor:
    """Our logits (N, vocabulary) of the N tokens ``written`` after a prompt, each given those before it."""
    source, target = [*prompt, *written[:-1]], [run.tokenizer.find("<pad>", run.tokenizer.eot), *written[:-1]]
    if not objective.continues:
        source = prompt
    batch = {}
    for prefix, ids in (("", source), ("target_", target)):
        batch[f"{prefix}tokens"] = torch.tensor([ids])
        batch[f"{prefix}segments"] = torch.ones(1, len(ids), dtype=torch.int32)
    batch["positions"] = torch.arange(len(source))[None]
    logits: Tensor = objective.logits(batch)[0, -len(written) :, : run.tokenizer.vocab_size]
    return logits


def head_logits(objective: Any, tokens: Tensor) -> list[Tensor]:
    """Logits of every head of an objective, for rows (B, T) without padding."""
    positions, segments = torch.arange(tokens.shape[1]).expand(tokens.shape), torch.ones_like(tokens, dtype=torch.int32)
    batch = {"tokens": tokens, "positions": positions, "segments": segments}
    batch |= {"target_tokens": tokens, "target_segments": segments}
    logits = [objective.logits(batch)]
    if isinstance(objective, MaskedLM) and objective.next_sentence:
        logits.append(objective.head["next"](objective.backbone.pooler(objective.backbone(batch))))
    return logits


def _load_exported(staging: Path) -> tuple[Any, dict[str, Any]]:
    """The exported model loaded by transformers in float32, and its missing, unexpected and mismatched parameters."""
    hf_class = getattr(transformers, json.loads((staging / CONFIG_FILE).read_text("utf-8"))["architectures"][0])
    model, info = hf_class.from_pretrained(
        staging, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    return model.eval(), {problem: info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (to_json(content, indent=2) + "\n").encode())
