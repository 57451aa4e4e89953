"""A bounded part of the fuzz of all readers; ``fuzz.campaign`` is the long run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fuzz import campaign
from fuzz.formats import Format, all_formats

from train.errors import UserError

INPUTS, SECONDS = 30, 0.1
"""Of each format; the slow ones end by their time."""


def test_mutated_files_raise_the_products_own_errors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    outcomes = [campaign.fuzz(form, INPUTS, SECONDS, seed=0) for form in all_formats(tmp_path)]
    assert {outcome.name: outcome.findings for outcome in outcomes if outcome.findings} == {}
    assert sum(outcome.inputs for outcome in outcomes) > 10 * len(outcomes)


def _leaks_a_key_error(content: bytes) -> None:
    if content != b"{}":
        raise KeyError(content)


def _hangs(content: bytes) -> None:
    while content != b"{}":
        time.sleep(0.01)


def _spins(content: bytes) -> None:
    while content != b"{}":
        pass


def _allocates(content: bytes) -> None:
    try:
        bytearray(1 << 45 if content != b"{}" else 1)
    except MemoryError as error:
        raise UserError("too large") from error


@pytest.mark.parametrize("read", [_leaks_a_key_error, _hangs, _spins, _allocates])
def test_a_reader_that_leaks_hangs_or_allocates_is_found(read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(campaign, "INPUT_S", 0.1)
    monkeypatch.setattr(campaign, "WAIT_S", 0.5 if read is _hangs else 60)
    form = Format("planted", [b"{}"], lambda draw, content: b"[]", read)
    assert len(campaign.fuzz(form, 2, 10, seed=0).findings) == 1
