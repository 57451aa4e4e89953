"""Whether a failure is a GPU's: errors of CUDA, NCCL and NVML as they are printed, counters, and kernel logs."""

from dataclasses import replace

import pytest

from cluster.device_health.device_fault import DeviceFault, classify
from cluster.device_health.evidence import DeviceEvidence
from cluster.device_health.gpu_state import GpuState

ASYNC = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
ECC = f"torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered{ASYNC}"
OLD_ECC = (
    "RuntimeError: cuda runtime error (39) : uncorrectable ECC error encountered at /pytorch/aten/src/THC/THC.cpp:265"
)
WATCHDOG = (
    "[rank1]:[E ProcessGroupNCCL.cpp:916] [Rank 1] NCCL watchdog thread terminated with exception: CUDA error: "
    f"uncorrectable ECC error encountered{ASYNC}Exception raised from c10_cuda_check_implementation"
)
NVLINK = (
    "terminate called after throwing an instance of 'c10::Error'\n"
    "  what():  CUDA error: uncorrectable NVLink error detected during the execution\n"
    "Exception raised from create_event_internal at /pytorch/c10/cuda/CUDACachingAllocator.cpp:733"
)
NCCL_LAUNCH = (
    "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled "
    "cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 719 'unspecified launch failure'"
)
NCCL_ARGUMENT = NCCL_LAUNCH.replace("719 'unspecified launch failure'", "1 'invalid argument'")
NCCL_PEER = (
    "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, remote "
    "process exited or there was a network error, NCCL version 2.20.5\nncclRemoteError: A call failed possibly due "
    "to a network error or a remote process exiting prematurely."
)
BUSY = f"RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable{ASYNC}"
FABRIC = f"RuntimeError: CUDA error: system not yet initialized{ASYNC}"
LOST = "Unable to determine the device handle for GPU0000:4F:00.0: GPU is lost.  Reboot the system to recover this GPU"
LAUNCH = f"torch.AcceleratorError: CUDA error: unspecified launch failure{ASYNC}"
ILLEGAL = f"torch.AcceleratorError: CUDA error: an illegal memory access was encountered{ASYNC}"
ASSERT = f"RuntimeError: CUDA error: device-side assert triggered{ASYNC}"
MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"
)
PYTHON = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\nValueError: the oar broke'


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ECC, DeviceFault("uncorrectable ECC error encountered")),
        (OLD_ECC, DeviceFault("uncorrectable ECC error encountered")),
        (WATCHDOG, DeviceFault("uncorrectable ECC error encountered")),
        (NVLINK, DeviceFault("uncorrectable NVLink error detected during the execution", "host")),
        (NCCL_LAUNCH, DeviceFault("unspecified launch failure")),
        (LAUNCH, DeviceFault("unspecified launch failure")),
        (BUSY, DeviceFault("CUDA-capable device(s) is/are busy or unavailable")),
        (FABRIC, DeviceFault("system not yet initialized", "host")),
        (LOST, DeviceFault("GPU is lost", "host")),
        # what a program can cause, and what it sees when another rank has gone
        *[(text, None) for text in (ILLEGAL, ASSERT, MEMORY, PYTHON, NCCL_ARGUMENT, NCCL_PEER, "")],
    ],
)
def test_fault_by_the_text_of_the_error_alone(error, expected):
    assert classify(error, None) == expected


GPU = GpuState("GPU-5f1c", "NVIDIA H100 80GB HBM3", "00000000:CB:00.0", ecc_uncorrected=0, remap_failed=False)
XID = "NVRM: Xid (PCI:0000:cb:00): "
DBE = XID + "48, pid=1797828, name=pt_main_thread, DBE (double bit error) ECC error 0x6 at sub-partition 1"
BUS = XID + "79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
GSP = (
    XID
    + "119, pid=2131, name=python3, Timeout after 6s of waiting for RPC response from GPU0 GSP! Expected function 76"
)
CONTAINED = XID + "94, pid=1234, name=python3, Contained ECC error"
REMAP = XID + "63, pid='<unknown>', name=<unknown>, Row Remapper: New row marked for remapping, reset gpu to activate."
FAULT = (
    XID + "31, pid=98765, name=pt_main_thread, Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS GPC0_HUBCLIENT"
)
WARP = (
    XID + "13, pid='<unknown>', name=<unknown>, Graphics SM Warp Exception on (GPC 7, TPC 7, SM 0): Illegal Instruction"
)
LINK = "NVRM: Xid (PCI:0000:cb:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x025001c6 0x00000000 0x00000000)"
LINK_WELL = "NVRM: Xid (PCI:0000:cb:00): 145, RLW_RXPIPE Nonfatal XC0 i0 Link 13 (0x0409a0c2 0x00000008 0x00000001)"


def seen(*messages, before=GPU, after=GPU):
    return DeviceEvidence(before, after, messages)


@pytest.mark.parametrize(
    ("error", "evidence", "reason", "scope"),
    [
        (ILLEGAL, seen(DBE), "Xid 48: double-bit ECC error", "gpu"),
        (ASSERT, seen(CONTAINED), "Xid 94: contained memory error", "gpu"),
        # the driver's word counts whatever the program says, or if it was killed without a word
        (PYTHON, seen(GSP), "Xid 119: the GPU's system processor does not answer", "host"),
        ("", seen(BUS), "Xid 79: the GPU has fallen off the bus", "host"),
        ("", seen(FAULT, LINK), "Xid 149: NVLink error", "host"),
        # an error of what the host's GPUs share outweighs one of the GPU alone
        (ECC, seen(DBE, BUS), "Xid 79: the GPU has fallen off the bus", "host"),
        # a warning beside an error that may be the program's
        (ILLEGAL, seen(REMAP), "Xid 63: a memory row or page is to be replaced", "gpu"),
        (LAUNCH, seen(FAULT, REMAP), "Xid 63: a memory row or page is to be replaced", "gpu"),
        (ILLEGAL, seen(after=replace(GPU, ecc_uncorrected=2)), "2 uncorrectable ECC errors", "gpu"),
        (PYTHON, seen(after=replace(GPU, remap_failed=True)), "a memory row could not be remapped", "gpu"),
        (PYTHON, seen(after=None), "the GPU no longer answers its driver", "host"),
    ],
)
def test_fault_that_the_driver_or_the_counters_report(error, evidence, reason, scope):
    assert classify(error, evidence) == DeviceFault(reason, scope, proven=True)


@pytest.mark.parametrize(
    ("error", "evidence"),
    [
        # the driver reports the program's error, and none of the device
        (ILLEGAL, seen(FAULT)),
        (LAUNCH, seen(FAULT)),
        (ASSERT, seen(WARP)),
        (ILLEGAL, seen(LINK_WELL.replace("cb", "ca"))),
        # another GPU of the host
        (ILLEGAL, seen(DBE.replace("0000:cb", "0000:3b"))),
        # old counts, or none at all
        (ILLEGAL, seen(before=replace(GPU, ecc_uncorrected=2), after=replace(GPU, ecc_uncorrected=2))),
        (ILLEGAL, seen(before=None)),
        (ILLEGAL, seen(before=None, after=None)),
        # a warning is no reason for an error that has nothing to do with the GPU
        (PYTHON, seen(REMAP, LINK_WELL)),
    ],
)
def test_errors_of_the_program_are_no_fault_of_the_device(error, evidence):
    assert classify(error, evidence) is None
