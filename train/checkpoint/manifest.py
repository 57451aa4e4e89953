"""The manifest of a checkpoint: sizes and hashes of its files, protected by a hash of its own.

``checkpoint.json`` is JSON whose first entry is the sha256 of all that follows it. This module imports little, since
the driver reads manifests too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictInt, StrictStr

from train.errors import UserError
from train.util.io import to_json
from train.util.reading import UNREADABLE
from train.util.run_layout import checkpoint_name, checkpoint_steps, shard_name

MANIFEST = "checkpoint.json"
VERSION, READ_VERSIONS = 3, (2, 3)
"""Version 2 lists every piece; 3 leaves out those that follow from ``even``: see ``train.checkpoint.pieces``."""
FILE = re.compile(r"rank_\d+\.safetensors")

_BEFORE, _AFTER = b'{"sha256": "', b'", '
_HEAD = len(_BEFORE) + 64 + len(_AFTER)


Count = Annotated[StrictInt, Field(ge=0, le=1 << 62)]


class _CursorForm(BaseModel):
    epoch: Count
    position: Count


class _ProgressForm(BaseModel):
    step: Count
    cursor: _CursorForm
    tokens: Count = 0
    updates: Count = 0
    score: float | None = None


class _FileForm(BaseModel):
    size: Count
    sha256: StrictStr
    pieces: list[tuple[StrictStr, StrictStr, Count, Count]]
    """(kind, parameter, first element, elements)."""


class _ManifestForm(BaseModel):
    """What readers take out of a manifest; its other keys are for people."""

    progress: _ProgressForm
    val_loss: float | None
    shapes: dict[StrictStr, list[Count]]
    scalars: dict[StrictStr, Any]
    corpus: StrictStr
    files: dict[StrictStr, _FileForm]
    even: dict[StrictStr, list[StrictStr]] = {}


class DamagedCheckpoint(Exception):  # noqa: N818  a finding, not an error of the program
    """A checkpoint that must not be used; the message names the damage."""


def to_bytes(values: dict[str, Any]) -> bytes:
    """The content of ``checkpoint.json`` for a manifest's values."""
    rest = to_json({"version": VERSION, **values}).encode()[1:]
    return _BEFORE + hashlib.sha256(rest).hexdigest().encode() + _AFTER + rest


def from_bytes(content: bytes, folder: str) -> dict[str, Any]:
    """The values of a manifest in ``folder`` ("step_<n>"); inverts ``to_bytes``. Raises DamagedCheckpoint."""
    rest = content[_HEAD:]
    if content[:_HEAD] != _BEFORE + hashlib.sha256(rest).hexdigest().encode() + _AFTER:
        raise DamagedCheckpoint(f"{MANIFEST} does not have the hash it was written with")
    try:
        values: dict[str, Any] = json.loads(b"{" + rest)
        if (version := values.get("version")) not in READ_VERSIONS:
            raise DamagedCheckpoint(f"{MANIFEST} has version {str(version)[:20]}, and {VERSION} is read")
        form = _ManifestForm.model_validate(values)
    except UNREADABLE as error:  # the hash is right: somebody else has written it so
        raise DamagedCheckpoint(f"{MANIFEST} is not one of a checkpoint") from error
    if folder != checkpoint_name(form.progress.step):
        raise DamagedCheckpoint(f"{MANIFEST} is that of step {form.progress.step}")
    if unexpected := [name for name in form.files if not FILE.fullmatch(name)]:
        raise DamagedCheckpoint(f"{MANIFEST} names a file {unexpected[0]!r}")
    if form.even and form.files.keys() != {shard_name(rank) for rank in range(max(1, len(form.files)))}:
        raise DamagedCheckpoint(f"{MANIFEST} does not name the files of all ranks")
    if foreign := [name for names in form.even.values() for name in names if name not in form.shapes]:
        raise DamagedCheckpoint(f"{MANIFEST} names a parameter {foreign[0]!r} without a shape")
    return values


def read_manifests(folder: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The manifests of a folder's checkpoints, oldest first; and the damage of unreadable ones, by step."""
    whole, damaged = [], {}
    for step in checkpoint_steps(folder):
        try:
            whole.append(read(folder / checkpoint_name(step)))
        except DamagedCheckpoint as damage:
            damaged[step] = str(damage)
    return sorted(whole, key=lambda m: m["progress"]["step"]), damaged


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in ``folder``, damaged or not; 0 where there is none."""
    return max(checkpoint_steps(folder), default=0)


def select(manifests: Sequence[dict[str, Any]], which: str, folder: Path) -> int:
    """The index, among the run's manifests from oldest to newest, of "latest", "best" or a step number."""
    if not manifests:
        raise UserError(f"{folder} has no complete checkpoint yet: give the command again that began this run")
    steps = [str(m["progress"]["step"]) for m in manifests]
    if which == "best":
        measured = [(value, -n) for n, m in enumerate(manifests) if (value := score(m)) is not None]
        return -min(measured)[1] if measured else len(steps) - 1
    if which == "latest":
        return len(steps) - 1
    if which in steps:
        return steps.index(which)
    raise UserError(f"{folder} has no checkpoint {which!r}. It has the steps {', '.join(steps)}; or say latest or best")


def surplus_steps(manifests: Sequence[dict[str, Any]], keep_last: int, keep_best: int) -> list[int]:
    """The steps of checkpoints that are neither among the newest nor among the best, and so may be deleted."""
    steps = sorted(m["progress"]["step"] for m in manifests)
    best = sorted((s, -m["progress"]["step"]) for m in manifests if (s := score(m)) is not None)
    kept = {*steps[-keep_last:], *(-step for _, step in best[:keep_best])}
    return [step for step in steps if step not in kept]


def score(values: dict[str, Any]) -> float | None:
    """The checkpoint's ``stop.metric``, the lower the better; None if it was not evaluated at this step."""
    value: float | None = values["progress"].get("score", values["val_loss"])  # older manifests have val_loss alone
    return value


def read(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in ``folder``. Raises DamagedCheckpoint if it is missing or damaged."""
    try:
        return from_bytes((folder / MANIFEST).read_bytes(), folder.name)
    except OSError as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read: {error.strerror}") from error
