"""Random numbers as a function of names: no state to carry, nothing that depends on who draws first."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: object) -> np.random.Generator:
    """The generator of ``key``, say (seed, "init", name): equal keys give equal numbers, others unrelated ones.

    Philox, a counter-based generator (Salmon et al. 2011), with 128 bits of the key's hash as its key.
    """
    text = "/".join(str(part) for part in key)
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))
    )


def seed_of(*key: object) -> int:
    """A seed for torch from ``key``: the numbers of a step are a function of (seed, step, rank), so nothing is saved."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
