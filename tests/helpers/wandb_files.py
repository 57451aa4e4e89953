"""Reads the records of offline W&B files, as ``wandb sync`` does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(file: Path) -> Iterator[Any]:
    """The protobuf records of a file: a 7-byte header, then 32 KiB blocks of LevelDB log records: crc (4 bytes),
    length (2), type (1), content.
    """
    from wandb.proto import wandb_internal_pb2

    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # the first or a middle part of a record
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(whole)
        whole = b""
        yield record
