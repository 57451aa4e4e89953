"""Random numbers of a rank's device."""

from __future__ import annotations

import torch

from train.distributed.device import seed_device


def test_seed_gives_the_numbers_of_manual_seed():
    for seed in (0, 1, 2**63 - 1):
        torch.manual_seed(seed)
        expected = torch.rand(5), torch.randint(100, (5,))
        seed_device(seed, torch.device("cpu"))
        assert torch.equal(torch.rand(5), expected[0])
        assert torch.equal(torch.randint(100, (5,)), expected[1])
