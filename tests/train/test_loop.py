"""Tests of the training loop's own tools; the loop itself is tested on real ranks, in tests/integration/train."""

from __future__ import annotations

import gc

from train.loop import planned_garbage_collection


def test_garbage_collection_is_off_inside_and_as_before_afterwards():
    frozen = gc.get_freeze_count()
    assert gc.isenabled()
    with planned_garbage_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > frozen
    assert gc.isenabled()
    assert frozen or gc.get_freeze_count() == 0
