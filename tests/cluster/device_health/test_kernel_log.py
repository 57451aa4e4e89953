"""The driver's messages in texts of the kernel log, in the words of several driver versions."""

import time

import pytest

from cluster.device_health.kernel_log import driver_errors, errors_of, parse_kmsg, parse_pci, read_driver_messages

KMSG = (
    "6,1084,5012345678,-;mlx5_core 0000:ab:00.0 mlx5_5: Port: 1 Link INIT\n"
    "3,1085,5012399999,-;NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus\n"
    " SUBSYSTEM=pci\n"
    " DEVICE=+pci:0000:44:00.0\n"
    "12,1086,5012400500,-,caller=T1;NVRM: GPU 0000:44:00.0: GPU has fallen off the bus.\n"
)


def test_kmsg_records_have_their_time_and_no_continuation_lines():
    assert parse_kmsg(KMSG) == [
        (5012.345678, "mlx5_core 0000:ab:00.0 mlx5_5: Port: 1 Link INIT"),
        (5012.399999, "NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus"),
        (5012.4005, "NVRM: GPU 0000:44:00.0: GPU has fallen off the bus."),
    ]


@pytest.mark.parametrize("address", ["0000:cb:00", "00000000:CB:00.0", "0000:CB:00.0", "cb:00.0", "cb:00"])
def test_pci_address_is_one_in_all_its_spellings(address):
    assert parse_pci(address) == (0, 0xCB, 0)


def test_pci_domains_differ_and_other_words_are_no_address():
    assert parse_pci("0018:01:00") == (0x18, 1, 0)
    assert parse_pci("GPU-5f1c") is None


@pytest.mark.parametrize(
    ("messages", "code", "pci", "severity"),
    [
        (["NVRM: Xid (PCI:0000:9b:00): 94, pid=1234, name=python3, Contained ECC error"], 94, "9b:00", "hardware"),
        (["NVRM: Xid (PCI:0000:65:00): 64, pid='N/A', Row Remapper: Failed to remap row"], 64, "65:00", "hardware"),
        (["[ 21.3] NVRM: Xid (0000:03:00): 62, 1cfa(2c88) 00000000 00000000"], 62, "03:00", "hardware"),
        (
            ["NVRM: Xid (PCI:0000:cb:00): 109, pid=1797828, name=pt_main_thread, Ch 00000008, CTX SWITCH TIMEOUT"],
            109,
            "cb:00",
            "program",
        ),
        (["NVRM: Xid (PCI:0000:dc:00): 45, pid=1818990, name=python3, Ch 00000001"], 45, "dc:00", "program"),
        (["NVRM: Xid (PCI:0019:01:00): 149, NETIR Fatal XC0 i0 Link -1 (0x000fe406)"], 149, "19:01:00", "hardware"),
        (["NVRM: Xid (PCI:0000:01:00): 144, SAW_MVB Nonfatal XC0 i0 Link 0 (0x1)"], 144, "01:00", "warning"),
        (
            ["NVRM: Xid (PCI:0000:9c:00): 154, GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)"],
            154,
            "9c:00",
            "hardware",
        ),
        (
            ["NVRM: Xid (PCI:0000:9c:00): 154, GPU recovery action changed from 0x4 (Drain and Reset) to 0x0 (None)"],
            154,
            "9c:00",
            "warning",
        ),
        (["NVRM: Xid (PCI:0000:01:00): 999, something new"], 999, "01:00", "warning"),
        # said without an Xid, in one message or several
        (["NVRM: GPU 0000:b3:00.0: GPU has fallen off the bus."], 79, "b3:00", "hardware"),
        (
            [
                "NVRM: The NVIDIA GPU 0000:b3:00.0",
                "NVRM: (PCI ID: 10de:26b5) installed in this system has",
                "NVRM: fallen off the bus and is not responding to commands.",
            ],
            79,
            "b3:00",
            "hardware",
        ),
    ],
)
def test_driver_error_by_message(messages, code, pci, severity):
    [error] = driver_errors(messages)
    assert (error.code, error.pci, error.severity) == (code, parse_pci(pci), severity)


def test_other_messages_are_no_errors():
    assert (
        driver_errors(["NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  570.158.01", "usb 1-1: reset"]) == []
    )


def test_errors_are_matched_to_their_gpu():
    errors = driver_errors([f"NVRM: Xid (PCI:0000:{bus}:00): 48, DBE" for bus in ("3b", "cb")])
    assert errors_of(errors, parse_pci("00000000:CB:00.0")) == errors[1:]
    assert errors_of(errors, None) == errors


def test_log_that_cannot_be_read_has_no_messages(tmp_path):
    assert read_driver_messages(0.0, str(tmp_path / "none")) == []
    assert all("NVRM" in message for message in read_driver_messages(time.monotonic() - 60))


def test_log_is_read_from_a_moment_on(tmp_path):
    log = tmp_path / "kmsg"
    log.write_text(KMSG)
    assert read_driver_messages(5012.4, str(log)) == ["NVRM: GPU 0000:44:00.0: GPU has fallen off the bus."]
