"""A snapshot of a rank's pieces in host memory, already in the form of the safetensors file that they will be.

Taken by the thread that writes it, while the next forward and backward pass run: weights and moments stand still until the next
update, which waits for it. A forked child would not be cheaper: a page that the update changes is then copied in its fault.

The file is written past the page cache (O_DIRECT), where the file system lets it: less than a tenth of the processor's time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096
"""What O_DIRECT's places and sizes are multiples of."""
CHUNK = 16 << 20
StateKey = tuple[str, str, int]
"""Kind, parameter, first element."""


class StagingBuffer:
    """Host memory for one rank's pieces (pinned beside a GPU), kept from save to save."""

    def __init__(self, device: torch.device) -> None:
        self.memory = mmap.mmap(-1, BLOCK)
        self.size = 0
        self.states: dict[StateKey, Tensor] = {}
        self.copy_issued = threading.Event()
        """Set once it is copied; from a GPU: once its copying is queued, with ``copied`` behind it."""
        self.copy_issued.set()
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.sources_ready: Any = torch.cuda.Event() if self.stream else None
        self.copy_done: Any = torch.cuda.Event() if self.stream else None

    def begin_copy(self, states: dict[StateKey, Tensor]) -> None:
        """What is to be taken, as it is now: views, each (numel,) float32."""
        self.states = states
        self.copy_issued.clear()
        if self.sources_ready:
            self.sources_ready.record()

    def copy(self) -> None:
        """Copy it, in the writer's thread; the training thread may go on, up to ``hold``."""
        try:
            header, places = _file_header(self.states)
            self.size = places[-1]
            if len(self.memory) < self.size:
                self._grow_memory()
            self.memory[: len(header)] = header
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                if self.stream:
                    self.stream.wait_event(self.sources_ready)
                for at, source in zip(places, self.states.values(), strict=False):
                    target = np.frombuffer(self.memory, np.float32, source.numel(), at)
                    if source.is_cuda:
                        torch.from_numpy(target).copy_(source, non_blocking=True)
                    else:
                        np.copyto(target, source.numpy())  # torch's own copy would start a second set of threads
                if self.copy_done:
                    self.copy_done.record()
        finally:
            self.copy_issued.set()

    def wait_for_copy(self) -> float:
        """Wait until what is taken may change: the training thread, before each update. The seconds it had to wait."""
        if self.copy_done and not self.copy_done.query():
            torch.cuda.current_stream().synchronize()  # the backward pass: it would have been waited for in any case
        elif self.copy_issued.is_set():
            return 0.0  # whatever else has the core between two looks at the clock
        began = time.monotonic()
        self.copy_issued.wait()
        if self.copy_done:
            self.copy_done.synchronize()
        return time.monotonic() - began

    def write_file(self, file: Path, given_up: Callable[[], bool]) -> dict[str, Any]:
        """Write what was taken, force it to the disk, and return the manifest's entry: size, sha256 and pieces."""
        if self.copy_done:
            self.copy_done.synchronize()
        view, digest = memoryview(self.memory)[: self.size], hashlib.sha256()
        whole = memoryview(self.memory)[: -(-self.size // BLOCK) * BLOCK]
        with _open_direct(file) as fd:
            for at in range(0, self.size, CHUNK):
                if given_up():
                    raise InterruptedError(errno.EINTR, "the run ended", str(file))
                digest.update(view[at : at + CHUNK])
                _write_all(fd, whole[at : at + CHUNK])
            os.ftruncate(fd, self.size)
            os.fsync(fd)
        pieces = [[kind, name, start, view.numel()] for (kind, name, start), view in self.states.items()]
        return {"size": self.size, "sha256": digest.hexdigest(), "pieces": pieces}

    def _grow_memory(self) -> None:
        """Memory for what is to be taken, in huge pages where there are any; what was there goes with its last view."""
        if self.stream and len(self.memory) > BLOCK:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(_address(self.memory)))
        self.memory = mmap.mmap(-1, -(-self.size // BLOCK) * BLOCK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        if self.stream:  # pinned in place: torch's own pinned memory is rounded up to a power of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(_address(self.memory), len(self.memory), 0))


def tensor_name(kind: str, name: str, start: int) -> str:
    """The name of a piece in its file."""
    return f"{kind}/{name}@{start}"


def _file_header(states: dict[StateKey, Tensor]) -> tuple[bytes, list[int]]:
    """The head of a safetensors file (https://github.com/huggingface/safetensors#format), and where each piece begins in the
    file, followed by where the last one ends.
    """
    ends = np.cumsum([0, *(4 * view.numel() for view in states.values())]).tolist()
    names = [tensor_name(*which) for which in states]
    entries = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, start, end in zip(names, ends, ends[1:], strict=False)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends]


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


@contextlib.contextmanager
def _open_direct(file: Path) -> Iterator[int]:
    """A descriptor of a new file, past the page cache where that is possible."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        fd = os.open(file, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(file, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    """Write all of it; through the page cache from where the file system wants no more past it."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
