"""Imported before Triton is: where there is no GPU, kernels run on the CPU in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
