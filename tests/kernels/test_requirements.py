"""Where Triton's kernels can run, and that what stands in their way is said with its cure."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch

import kernels
from kernels import requirements
from kernels.requirements import DeviceLimits, Toolchain

CUDA = torch.device("cuda")
ON_GPU = types.SimpleNamespace(is_cuda=True)
"""All that the choice of an implementation asks of a tensor."""

HEADERS = Path("/usr/include/python3.12")
COMPLETE = Toolchain(cc=None, compiler="/usr/bin/gcc", include=HEADERS, has_python_header=True)
A100, L4 = DeviceLimits((8, 0), 163 << 10), DeviceLimits((8, 9), 99 << 10)
V100, T4 = DeviceLimits((7, 0), 96 << 10), DeviceLimits((7, 5), 64 << 10)


@pytest.fixture(autouse=True)
def choice_as_before():
    yield
    kernels.use("auto", torch.device("cpu"))


@pytest.mark.parametrize(
    ("limits", "changes", "words"),
    [
        (A100, {}, None),
        (L4, {}, None),
        (DeviceLimits((9, 0), 227 << 10), {}, None),
        (DeviceLimits((12, 0), 99 << 10), {}, None),
        (V100, {}, "this GPU is sm_70, and Triton's kernels need sm_80 (Ampere) or newer"),
        (T4, {"compiler": None}, "this GPU is sm_75, and Triton's kernels need sm_80 (Ampere) or newer"),
        (
            DeviceLimits((8, 0), 48 << 10),
            {},
            "this GPU gives a block 48 KiB of shared memory, and Triton's kernels need 99",
        ),
        (
            A100,
            {"compiler": None},
            "Triton needs a C compiler: install gcc or clang (apt-get install gcc), or name one in CC",
        ),
        (
            A100,
            {"compiler": None, "cc": "ccache gcc"},
            "CC=ccache gcc names no program: Triton needs a C compiler (gcc or clang; no arguments in CC)",
        ),
        (
            A100,
            {"has_python_header": False},
            f"Triton needs Python.h, which is not in {HEADERS}: install Python's headers (apt-get install python3-dev)",
        ),
    ],
)
def test_obstacle_names_what_is_missing_and_its_cure(limits, changes, words):
    assert requirements.obstacle(limits, dataclasses.replace(COMPLETE, **changes)) == words


@pytest.mark.parametrize(
    ("limits", "toolchain", "problem"),
    [
        (T4, COMPLETE, "this GPU is sm_75"),
        (A100, dataclasses.replace(COMPLETE, compiler=None), "Triton needs a C compiler"),
        (A100, dataclasses.replace(COMPLETE, has_python_header=False), "Triton needs Python.h"),
    ],
)
def test_auto_runs_torch_and_triton_is_refused_where_triton_cannot_run(monkeypatch, limits, toolchain, problem):
    monkeypatch.setattr(requirements, "find_toolchain", lambda: toolchain)
    with requirements.assuming_limits(limits):
        assert kernels.use("auto", CUDA).startswith(f"torch's own: {problem}")
        assert kernels.dispatch.implementation(ON_GPU) is kernels.torch_ops
        with pytest.raises(ValueError, match=f"kernels=triton, but {problem}.*; or kernels=auto$"):
            kernels.use("triton", CUDA)


def test_auto_runs_triton_where_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(requirements, "find_toolchain", lambda: COMPLETE)
    with requirements.assuming_limits(L4):
        assert kernels.use("auto", CUDA) == "Triton's, on CUDA"
        assert kernels.dispatch.implementation(ON_GPU) is kernels.triton_ops
        assert kernels.use("triton", CUDA) == "Triton's, as kernels=triton asks"


@pytest.mark.parametrize(
    ("programs", "cc", "found"),
    [
        (("gcc", "clang"), None, "gcc"),
        (("clang",), None, "clang"),
        ((), None, None),
        (("gcc", "icx"), "icx", "icx"),
        (("gcc",), "icx", None),
        (("gcc",), "gcc -m64", None),
        (("gcc",), "", None),
    ],
)
def test_compiler_is_looked_for_in_tritons_order(monkeypatch, tmp_path, programs, cc, found):
    for program in programs:
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    assert requirements.find_toolchain().compiler == (None if found is None else str(tmp_path / found))


def test_python_header_is_looked_for_where_python_installs_it(monkeypatch, tmp_path):
    paths = {"include": str(tmp_path)}
    monkeypatch.setattr(requirements.sysconfig, "get_paths", lambda scheme: paths)
    assert not requirements.find_toolchain().has_python_header
    (tmp_path / "Python.h").touch()
    assert requirements.find_toolchain().has_python_header


@pytest.mark.parametrize(
    ("capability", "products"),
    [((8, 0), "mma"), ((8, 9), "mma"), ((9, 0), "wgmma"), ((10, 0), "tcgen05"), ((10, 3), "tcgen05"), ((12, 0), "mma")],
)
def test_instruction_of_products_follows_from_the_capability(capability, products):
    assert DeviceLimits(capability, 0).products == products
