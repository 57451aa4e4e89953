"""What importing the ops may not do."""

import subprocess
import sys


def test_importing_the_ops_loads_no_driver():
    code = (
        "import sys, kernels; assert 'triton' not in sys.modules; import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
