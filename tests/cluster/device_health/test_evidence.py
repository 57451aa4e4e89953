"""The lines that show a GPU's counters and its host's kernel log in a failure's block."""

from cluster.device_health.evidence import DeviceEvidence, describe_evidence
from cluster.device_health.gpu_state import GpuState, describe_speed

BEFORE = GpuState(
    uuid="GPU-5f1c8a11",
    name="NVIDIA H100 80GB HBM3",
    bus="00000000:CB:00.0",
    ecc_corrected=0,
    ecc_uncorrected=0,
    ecc_uncorrected_ever=11,
    rows_remapped=11,
)
AFTER = GpuState(
    uuid="GPU-5f1c8a11",
    name="NVIDIA H100 80GB HBM3",
    bus="00000000:CB:00.0",
    ecc_corrected=4,
    ecc_uncorrected=1,
    ecc_uncorrected_ever=12,
    rows_remapped=11,
    remap_pending=True,
    remap_failed=False,
    throttle=0x0000000000000044,
    sm_mhz=1110,
    sm_max_mhz=1980,
    temperature_c=87,
    power_w=351.2,
    power_limit_w=700.0,
    memory_used_mib=71203,
    memory_mib=81559,
)
DBE = "NVRM: Xid (PCI:0000:cb:00): 48, pid=1797828, name=pt_main_thread, DBE (double bit error) ECC error"


def test_evidence_shows_counters_speed_memory_and_the_kernel_log():
    other = DBE.replace("0000:cb", "0000:3b")
    assert describe_evidence(DeviceEvidence(BEFORE, AFTER, (DBE, other))) == [
        "NVIDIA H100 80GB HBM3 GPU-5f1c8a11 00000000:CB:00.0",
        "  1 uncorrectable ECC errors (+1 since the worker began), 4 corrected ones (+4 since the worker began), "
        "12 uncorrectable ones ever (+1 since the worker began), 11 memory rows remapped, "
        "a row is to be remapped at the next reset",
        "  1,110 of 1,980 MHz, 87 C, 351 of 700 W, slowed down by power cap, heat (hardware)",
        "  71,203 of 81,559 MiB of its memory used",
        "the kernel log of its host:",
        f"  {DBE}",
    ]


def test_absent_sources_leave_no_lines():
    assert describe_evidence(DeviceEvidence()) == []
    assert describe_evidence(DeviceEvidence(after=GpuState(name="NVIDIA GeForce RTX 3060"))) == [
        "NVIDIA GeForce RTX 3060"
    ]
    assert describe_speed(GpuState(sm_mhz=900)) == "900 MHz"


def test_gpu_that_no_longer_answers_is_said_to():
    [line] = describe_evidence(DeviceEvidence(BEFORE, None))
    assert line == "NVIDIA H100 80GB HBM3 GPU-5f1c8a11 no longer answers the driver"


def test_many_messages_are_counted():
    lines = describe_evidence(DeviceEvidence(messages=(DBE,) * 40))
    assert len(lines) < 10
    assert lines[-1] == "  ... and 34 more"


def test_evidence_survives_the_way_to_the_driver():
    evidence = DeviceEvidence(BEFORE, AFTER, (DBE,))
    assert DeviceEvidence.from_json(evidence.to_json()) == evidence
    assert DeviceEvidence.from_json(DeviceEvidence().to_json()) == DeviceEvidence()
