"""Whole runs on Triton's kernels, in the interpreter where there is no GPU: the numbers are those of torch's own."""

from __future__ import annotations

import pytest
import torch
from helpers import gloo_ranks

SMALL = ["model.layers=1", "cluster.workers=2", "steps=3", "batch.global=2", "eval_every=0", "save_every=0"]
GPT = ["model=gpt_tiny"]
LLAMA = ["model=llama_tiny", "model.checkpoint_activations=true", "model.dropout=0.1"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("model", "zero"), [(GPT, 2), (LLAMA, 3)], ids=["gpt", "llama-checkpointed"])
def test_triton_and_torch_kernels_train_alike(make, corpus, model, zero):
    curves = []
    for choice in ("torch", "triton"):
        config = make(*model, *SMALL, f"zero={zero}", f"kernels={choice}", name=choice)
        assert gloo_ranks.train_world(config, corpus, timeout=600) == ["done", "done"]  # the interpreter is slow
        lines = gloo_ranks.metrics(config)
        curves.append(torch.tensor([[line["loss"], line["grad_norm"], line.get("val_loss", 0.0)] for line in lines]))
    assert curves[0].shape == (3, 3)
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)
