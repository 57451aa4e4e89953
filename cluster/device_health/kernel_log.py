"""The NVIDIA driver's messages in the kernel log, above all Xid errors, and the GPU that each is about.

Only the reading of ``/dev/kmsg`` touches the host; the rest is pure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

KMSG = "/dev/kmsg"
MOST_BYTES = 16 << 20
"""Bytes of the kernel log that are read at most; the kernel's own buffer is seldom larger."""
RECORD_BYTES = 8192
"""A record of ``/dev/kmsg`` is read whole or not at all, and the kernel makes none that is longer."""

Pci = tuple[int, int, int]
"""Domain, bus and device: NVML, the driver and the kernel write the same address in different ways."""
Severity = Literal["hardware", "warning", "program"]

XIDS: dict[int, tuple[Severity, str]] = {
    13: ("program", "graphics engine exception"),
    31: ("program", "memory page fault"),
    43: ("program", "the GPU stopped processing"),
    45: ("program", "channels cleaned up after an earlier error"),
    48: ("hardware", "double-bit ECC error"),
    62: ("hardware", "internal micro-controller halt"),
    63: ("warning", "a memory row or page is to be replaced"),
    64: ("hardware", "a memory row or page could not be replaced"),
    74: ("hardware", "NVLink error"),
    79: ("hardware", "the GPU has fallen off the bus"),
    92: ("warning", "high rate of single-bit ECC errors"),
    94: ("hardware", "contained memory error"),
    95: ("hardware", "uncontained memory error"),
    109: ("program", "context switch timeout"),
    119: ("hardware", "the GPU's system processor does not answer"),
    120: ("hardware", "error of the GPU's system processor"),
    121: ("warning", "chip-to-chip link error"),
    140: ("hardware", "unrecovered ECC error"),
    143: ("hardware", "GPU initialization error"),
    **dict.fromkeys(range(144, 151), ("hardware", "NVLink error")),
    154: ("hardware", "the GPU needs a reset or a reboot"),
    158: ("hardware", "the GPU timed out"),
}
"""By NVIDIA's catalogue. "program": as a rule the program's own error; "warning": the GPU goes on working."""
HOST_XIDS = frozenset({74, 79, 119, 120, *range(144, 151)})
"""Errors of links, bus and driver, which the other GPUs of the host share."""
HARMLESS = re.compile(r"\bNonfatal\b|to 0x0 \(None\)")
"""Says within an Xid's text that nothing need be done: of links since 144, and of 154."""

XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<pci>[0-9a-fA-F:.]+)\): (?P<code>\d+), (?P<text>.*)")
OFF_THE_BUS = re.compile(
    r"NVRM: .*?(?P<pci>[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2})\S*(?s:.*)fallen off the bus"
)
ADDRESS = re.compile(r"(?:([0-9a-fA-F]+):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})(?:\.\d)?")


@dataclass(frozen=True)
class DriverError:
    """An error that the driver reported of one GPU."""

    pci: Pci | None
    code: int
    text: str
    """The line as the kernel has it."""

    @property
    def severity(self) -> Severity:
        """Whose error it is, as far as its code and text tell; an unknown code is nobody's but a warning."""
        severity = XIDS.get(self.code, ("warning", ""))[0]
        return "warning" if severity == "hardware" and HARMLESS.search(self.text) else severity

    @property
    def meaning(self) -> str:
        """The error in words: "Xid 48: double-bit ECC error"."""
        words = XIDS.get(self.code, ("warning", ""))[1]
        return f"Xid {self.code}: {words}" if words else f"Xid {self.code}"


def parse_pci(address: str) -> Pci | None:
    """The PCI address in any of its spellings: "0000:cb:00", "00000000:CB:00.0", "3b:00.0"."""
    match = ADDRESS.fullmatch(address.strip())
    return (int(match[1] or "0", 16), int(match[2], 16), int(match[3], 16)) if match else None


def parse_kmsg(log: str) -> list[tuple[float, str]]:
    """The messages of a text of ``/dev/kmsg`` with the seconds since the host started.

    Lines that begin with a space continue a record with fields of their own.
    """
    messages = []
    for line in log.splitlines():
        head, _, message = line.partition(";")
        fields = head.split(",")
        if message and len(fields) >= 3 and fields[2].isdigit():
            messages.append((int(fields[2]) / 1e6, message))
    return messages


def driver_errors(messages: Sequence[str]) -> list[DriverError]:
    """The driver's errors among messages of the kernel log, in their order."""
    found = []
    for number, message in enumerate(messages):
        xid = XID.search(message)
        if xid:
            found.append(DriverError(parse_pci(xid["pci"]), int(xid["code"]), message.strip()))
            continue
        # Newer drivers say it without an Xid, over as many as three messages.
        lost = OFF_THE_BUS.search("\n".join(messages[number : number + 3])) if "NVRM" in message else None
        if lost and lost["pci"] in message:
            found.append(DriverError(parse_pci(lost["pci"]), 79, " ".join(lost[0].split())))
    return found


def errors_of(errors: Sequence[DriverError], pci: Pci | None) -> list[DriverError]:
    """The errors of the GPU at a PCI address; all of them where it is not known."""
    return [error for error in errors if pci is None or error.pci in (pci, None)]


def read_driver_messages(since: float, path: str = KMSG) -> list[str]:
    """The driver's messages since that moment of the monotonic clock; none where this user may not read the log."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    log = bytearray()
    try:
        while len(log) < MOST_BYTES:
            try:
                record = os.read(fd, RECORD_BYTES)
            except BrokenPipeError:  # the kernel overwrote the record that was next
                continue
            except OSError:  # all is read, or it may not be
                break
            if not record:
                break
            log += record
    finally:
        os.close(fd)
    messages = parse_kmsg(log.decode(errors="replace"))
    return [message for at, message in messages if at >= since and ("NVRM" in message or "fallen off" in message)]
