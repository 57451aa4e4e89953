"""Selects Triton's interpreter where there is no GPU; must be imported before Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
