"""Random numbers as pure functions of names: no generator state to save."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: object) -> np.random.Generator:
    """A NumPy generator seeded by ``key``, such as (seed, "init", name): equal keys give equal numbers.

    Philox, a counter-based generator (Salmon et al. 2011), with 128 bits of the key's hash as its key.
    """
    text = "/".join(str(part) for part in key)
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))
    )


def seed_of(*key: object) -> int:
    """A 63-bit seed for torch from ``key``, such as (seed, step, rank): no generator state is saved in checkpoints."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
