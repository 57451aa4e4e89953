"""The verdict on an attempt from its ranks' exits, and the lines that explain it. Tables of pure cases."""

import pytest

from cluster.device_health.evidence import DeviceEvidence
from cluster.device_health.gpu_state import GpuState
from cluster.supervision.failure_report import explain, signature
from cluster.supervision.outcome import Diagnosis, Heartbeat, WorkerExit, decide_outcome, fault_of

GLOO = "Traceback (most recent call last):\nRuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer"
OOPS = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\nValueError: the oar broke'


def exits_of(*given):
    return [WorkerExit(order=order, **fields) for order, fields in enumerate(given)]


@pytest.mark.parametrize(
    ("given", "size", "kind", "cause"),
    [
        ([], 2, "running", None),
        ([{"rank": 0, "code": 0}], 2, "running", None),
        ([{"rank": 1, "code": 0}, {"rank": 0, "code": 0}], 2, "done", None),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": 75}], 2, "stopped", None),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": 0}], 2, "stopped", None),
        ([{"rank": 1, "code": -9}], 2, "failed", 1),
        # the victims' errors came first, and still the killed rank is the cause
        (
            [{"rank": 0, "code": 1, "error": GLOO}, {"rank": 2, "code": 1, "error": GLOO}, {"rank": 1, "code": -9}],
            3,
            "failed",
            1,
        ),
        ([{"rank": 0, "code": 1, "error": GLOO}, {"rank": 1, "code": 1, "error": OOPS}], 2, "failed", 1),
        # a rank that the driver killed is never the cause
        ([{"rank": 0, "code": -9, "killed_by_driver": True}, {"rank": 1, "code": 1, "error": GLOO}], 2, "failed", 1),
        # only connection errors: the first heard of is as good as it gets
        ([{"rank": 1, "code": 1, "error": GLOO}, {"rank": 0, "code": 1, "error": GLOO}], 2, "failed", 1),
        (
            [{"rank": 1, "code": 2, "error": "wrong corpus"}, {"rank": 0, "code": 2, "error": "wrong corpus"}],
            2,
            "bad_input",
            1,
        ),
        ([{"rank": 0, "code": 1, "error": OOPS}, {"rank": 1, "code": 2, "error": "wrong"}], 2, "failed", 0),
        # code 2 without a message is not bad input: something called exit(2)
        ([{"rank": 0, "code": 2}], 1, "failed", 0),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": -11}], 2, "failed", 1),
    ],
)
def test_verdict_and_first_cause_by_exits(given, size, kind, cause):
    verdict = decide_outcome(exits_of(*given), size)
    assert verdict.kind == kind
    assert (verdict.cause.rank if verdict.cause else None) == cause


def block(*given, size=4):
    return "\n".join(explain(decide_outcome(exits_of(*given), size)))


def test_killed_rank_is_reported_with_host_pid_signal_and_log_tail():
    text = block(
        {"rank": 0, "code": 1, "error": GLOO},
        {
            "rank": 3,
            "code": -9,
            "host": "oar7",
            "pid": 4242,
            "tail": ("step 11", "step 12"),
            "peak_mib": 900,
            "memory_mib": 8000,
        },
        {"rank": 1, "code": -9, "killed_by_driver": True},
    )
    assert text.splitlines()[0] == "rank 3 on oar7 (pid 4242) killed by SIGKILL"
    assert "  step 12" in text
    assert "no lack of memory" in text
    assert "ranks 0, 1 fell with it" in text
    assert "gloo" not in text


def test_out_of_memory_kill_is_reported_as_such():
    text = block({"rank": 0, "code": -9, "oom": 1, "peak_mib": 7900, "memory_mib": 8000})
    assert "out of memory" in text
    assert "7,900 MiB" in text


def test_exception_is_reported_by_traceback_without_log_tail():
    text = block({"rank": 2, "code": 1, "error": OOPS, "tail": ("noise",)}, {"rank": 0, "code": 1, "error": GLOO})
    assert text.splitlines()[0] == "rank 2 raised ValueError"
    assert "ValueError: the oar broke" in text
    assert "noise" not in text
    assert "rank 0 fell with it" in text


def test_lost_host_is_reported_with_its_last_heartbeat():
    text = block(
        {
            "rank": 1,
            "code": -9,
            "fault": "host lost",
            "description": "was lost with its host",
            "at": Heartbeat(1, 7, "backward", 2),
        }
    )
    assert text == "rank 1 was lost with its host in backward of step 7, micro-batch 3"


def test_exit_without_error_is_reported_with_log_tail():
    text = block({"rank": 1, "code": 7, "tail": ("about to exit",)})
    assert "exited with code 7 without a word" in text
    assert "about to exit" in text


def test_many_collateral_ranks_take_one_line():
    given = [{"rank": r, "code": 1, "error": GLOO} for r in range(1, 40)] + [{"rank": 0, "code": -6}]
    lines = explain(decide_outcome(exits_of(*given), 40))
    assert len([line for line in lines if "fell with it" in line]) == 1
    assert "SIGABRT" in lines[0]


CUDA = (
    "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. "
    "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
)
HOST = (
    "Traceback\nRuntimeError: [enforce fail at alloc_cpu.cpp:124] . "
    "DefaultCPUAllocator: can't allocate memory: you tried ..."
)


ECC = "Traceback\ntorch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"
NCCL_ECC = (
    "Traceback\ntorch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, "
    "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 214 'uncorrectable ECC error encountered'"
)
WATCHDOG = "[Rank 1] NCCL watchdog thread terminated with exception: CUDA error: uncorrectable ECC error encountered"
GPU = GpuState(uuid="GPU-5f1c", name="NVIDIA H100 80GB HBM3", bus="00000000:CB:00.0")
BUS = "NVRM: Xid (PCI:0000:cb:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
OFF_THE_BUS = DeviceEvidence(GPU, None, (BUS,))


@pytest.mark.parametrize(
    ("exited", "fault"),
    [
        ({"code": -9}, "killed"),
        ({"code": -11}, "killed"),
        ({"code": -9, "oom": 1}, "out of host memory"),
        ({"code": 1, "error": CUDA}, "out of device memory"),
        (
            {"code": 1, "error": "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"},
            "out of device memory",
        ),
        ({"code": 1, "error": HOST}, "out of host memory"),
        ({"code": 1, "error": "Traceback\nMemoryError"}, "out of host memory"),
        ({"code": 1, "error": OOPS}, "raised"),
        ({"code": 7}, "raised"),
        ({"code": 1, "error": GLOO}, "network lost"),
        ({"code": 2, "error": "10 updates in a row", "kind": "not_finite"}, "not finite"),
        ({"code": -9, "fault": "worker lost"}, "worker lost"),
        ({"code": 1, "error": ECC}, "device"),
        ({"code": 1, "error": NCCL_ECC}, "device"),
        ({"code": -6, "tail": (WATCHDOG,)}, "device"),  # NCCL's watchdog ends the process, and says why in the log
        ({"code": 1, "error": "failed its preflight: 3 of 40 matrix products were wrong", "kind": "device"}, "device"),
        # the driver's word on the GPU of a rank that was killed, or whose loss was no number
        ({"code": -9, "evidence": OFF_THE_BUS}, "device"),
        ({"code": 2, "error": "10 updates in a row", "kind": "not_finite", "evidence": OFF_THE_BUS}, "device"),
        ({"code": 1, "error": OOPS, "evidence": DeviceEvidence()}, "raised"),
    ],
)
def test_fault_by_exit(exited, fault):
    assert fault_of(WorkerExit(rank=0, order=0, **exited)) == fault


@pytest.mark.parametrize(
    ("given", "told_to_stop", "kind", "fault"),
    [
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": 75}], [1], "stopped", "preempted"),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": 75}], [0, 1], "stopped", None),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": 75}], [], "stopped", None),
        # the notice was too short to save
        ([{"rank": 0, "code": 1, "error": GLOO}, {"rank": 1, "code": -9}], [1], "failed", "preempted"),
        ([{"rank": 0, "code": -9}, {"rank": 1, "code": 1, "error": GLOO}], [1], "failed", "killed"),
    ],
)
def test_stop_signal_to_some_ranks_is_a_preemption(given, told_to_stop, kind, fault):
    verdict = decide_outcome(exits_of(*given), 2, None, told_to_stop)
    assert (verdict.kind, verdict.fault) == (kind, fault)


def test_diagnosis_takes_precedence_over_the_exits_it_led_to():
    diagnosis = Diagnosis(
        "hung",
        2,
        "hung: nothing moved for 31 s in data of step 9",
        ("ranks 0, 1 wait in all_reduce_sum #40", "", "  File x"),
    )
    exits = exits_of(
        *({"rank": rank, "code": -9, "killed_by_driver": True, "host": "oar", "pid": 10 + rank} for rank in (1, 0, 2))
    )
    verdict = decide_outcome(exits, 3, diagnosis)
    assert (verdict.kind, verdict.fault, verdict.cause.rank) == ("failed", "hung", 2)
    lines = explain(verdict)
    assert lines[:2] == [
        "rank 2 on oar (pid 12) hung: nothing moved for 31 s in data of step 9",
        "ranks 0, 1 wait in all_reduce_sum #40",
    ]
    assert lines[-1] == "ranks 0, 1 fell with it (ended by the driver)"


def test_hang_without_culprit_is_reported_without_a_rank():
    assert explain(
        decide_outcome(
            exits_of({"rank": 0, "code": -9, "killed_by_driver": True}),
            1,
            Diagnosis("hung", None, "no rank has moved for 61 s"),
        )
    )[0] == ("no rank has moved for 61 s")


def test_long_traceback_is_cut_to_its_end():
    error = "\n".join(["Traceback", *(f'  File "x.py", line {n}' for n in range(100)), "ValueError: the oar broke"])
    lines = explain(decide_outcome(exits_of({"rank": 1, "code": 1, "error": error}), 2))
    assert len(lines) < 30
    assert "... (78 lines more in its log)" in lines[2]
    assert lines[-1] == "ValueError: the oar broke"


def test_out_of_memory_report_names_a_cure():
    assert "zero=2 or zero=3" in block({"rank": 0, "code": 1, "error": CUDA})
    assert "fewer workers on this host" in block({"rank": 0, "code": -9, "oom": 1, "peak_mib": 9, "memory_mib": 10})


def test_signature_is_equal_across_processes_and_differs_by_error():
    def of(**end):
        return signature(decide_outcome([WorkerExit(rank=0, order=0, **end)], 1))

    assert of(code=1, error="Traceback\nValueError: 0x7f12 at 3", pid=7) == of(
        code=1, error="x\nValueError: 0x7f99 at 4", pid=8
    )
    assert of(code=1, error="ValueError: a") != of(code=1, error="ValueError: b")
    assert of(code=-9) != of(code=-11)


def test_rank_whose_gpu_the_driver_reports_is_the_cause_whoever_was_first():
    given = [{"rank": 0, "code": 1, "error": OOPS}, {"rank": 1, "code": -9, "evidence": OFF_THE_BUS}]
    verdict = decide_outcome(exits_of(*given), 2)
    assert (verdict.fault, verdict.cause.rank, verdict.device_fault.scope) == ("device", 1, "host")
    refused = decide_outcome(exits_of({**given[1], "code": 2, "error": "x", "kind": "not_finite"}), 1)
    assert (refused.kind, refused.fault) == ("failed", "device")


def test_failed_gpu_is_reported_with_its_counters_and_the_kernel_log():
    lines = block(
        {
            "rank": 3,
            "code": 1,
            "host": "oar7",
            "pid": 4242,
            "gpu": "5",
            "error": ECC,
            "evidence": OFF_THE_BUS,
            "at": Heartbeat(3, 12, "backward"),
        },
        {"rank": 1, "code": -9, "killed_by_driver": True},
    ).splitlines()
    assert lines[0] == (
        "rank 3 on oar7 (pid 4242) lost its GPU 5 in backward of step 12: Xid 79: the GPU has fallen off the bus"
    )
    assert lines[1:4] == [
        "NVIDIA H100 80GB HBM3 GPU-5f1c no longer answers the driver",
        "the kernel log of its host:",
        f"  {BUS}",
    ]
    assert "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered" in lines
    assert any(line.startswith("cure: the job leaves that device") for line in lines)
