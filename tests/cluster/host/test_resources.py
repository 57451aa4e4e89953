"""What a host has for a job: GPUs as a table over /dev and CUDA_VISIBLE_DEVICES, and its limit of open files."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.host.resources import usable_gpus

REPOSITORY = Path(__file__).resolve().parents[3]
EIGHT = [f"nvidia{n}" for n in range(8)]


@pytest.mark.parametrize(
    ("files", "visible", "gpus"),
    [
        ([], None, 0),
        ([], "0", 0),  # a variable names no card into being
        (["nvidia0"], None, 1),
        (EIGHT, None, 8),
        (EIGHT, "0,1", 2),
        (EIGHT, "", 0),
        (EIGHT, "-1", 0),
        (EIGHT, "2,-1,3", 1),  # CUDA reads no further
        (["nvidia0"], "0,1", 1),
        (EIGHT, "GPU-1a,GPU-2b", 2),
        # instances of a card that is split share its file
        (["nvidia0"], "MIG-1,MIG-2,MIG-3,MIG-4,MIG-5,MIG-6,MIG-7", 7),
        (["nvidia0"], "MIG-GPU-1a/0/0,MIG-GPU-1a/1/0", 2),
    ],
)
def test_gpus_that_may_be_used_by_files_and_variable(files, visible, gpus):
    assert usable_gpus(files, visible) == gpus


def test_limit_of_open_files_is_raised_to_what_the_host_allows():
    code = (
        "import resource as r; hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (256, hard));"
        "from cluster.host import resources; resources.raise_file_limit();"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0], min(hard, resources.MOST_FILES))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    now, wanted = map(int, done.stdout.split())
    assert now == wanted > 256
