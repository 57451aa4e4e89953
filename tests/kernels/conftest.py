"""Marks every test of the kernels `gpu` on a machine with a GPU; skips those that need one elsewhere."""

import pytest
import torch

GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kernels" in item.path.as_posix():
            if GPU:
                item.add_marker(pytest.mark.gpu)
            elif item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
