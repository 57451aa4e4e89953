"""Importing ``kernels`` has no side effects."""

import subprocess
import sys


def test_import_of_kernels_loads_no_triton_and_no_driver():
    code = (
        "import sys, kernels; assert 'triton' not in sys.modules; import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
