"""Copies a rank's tensors to host memory, laid out as a safetensors file, and writes that file.

The writer's thread copies while the next forward and backward pass run: weights and moments do not change until the
next update, which waits for the copy. Forking would not be cheaper: every page that the update changes would be copied.

The file is written past the page cache (O_DIRECT) where the file system allows it, for a tenth of the CPU time.
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
"""O_DIRECT needs offsets and sizes that are multiples of this (bytes)."""
CHUNK = 16 << 20
"""Bytes that are hashed and written at a time."""
StateKey = tuple[str, str, int]
"""(kind, parameter, first element) of a piece of the training state."""


class StagingBuffer:
    """Host memory for one rank's pieces of the training state, reused by every save; pinned if there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.memory = mmap.mmap(-1, BLOCK)
        self.size = 0
        self.states: dict[StateKey, Tensor] = {}
        self.copy_issued = threading.Event()
        """Set once all is copied; from a GPU, once the copies are queued and ``copy_done`` behind them."""
        self.copy_issued.set()
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.sources_ready: Any = torch.cuda.Event() if self.stream else None
        self.copy_done: Any = torch.cuda.Event() if self.stream else None

    def begin_copy(self, states: dict[StateKey, Tensor]) -> None:
        """Set the tensors to copy, in their present state: views, each (numel,) float32."""
        self.states = states
        self.copy_issued.clear()
        if self.sources_ready:
            self.sources_ready.record()

    def copy(self) -> None:
        """Copy the tensors, in the writer's thread; the training thread may go on up to ``wait_for_copy``."""
        try:
            header, offsets = _file_header(self.states)
            self.size = offsets[-1]
            if len(self.memory) < self.size:
                self._grow_memory()
            self.memory[: len(header)] = header
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                if self.stream:
                    self.stream.wait_event(self.sources_ready)
                for offset, source in zip(offsets, self.states.values(), strict=False):
                    target = np.frombuffer(self.memory, np.float32, source.numel(), offset)
                    if source.is_cuda:
                        torch.from_numpy(target).copy_(source, non_blocking=True)
                    else:
                        np.copyto(target, source.numpy())  # torch's copy would start a second pool of threads
                if self.copy_done:
                    self.copy_done.record()
        finally:
            self.copy_issued.set()

    def wait_for_copy(self) -> float:
        """Wait, in the training thread before each update, until the tensors may change; returns the seconds waited."""
        if self.copy_done and not self.copy_done.query():
            torch.cuda.current_stream().synchronize()  # the backward pass, which the update waits for anyway
        elif self.copy_issued.is_set():
            return 0.0  # two readings of the clock would count time of other threads
        start = time.monotonic()
        self.copy_issued.wait()
        if self.copy_done:
            self.copy_done.synchronize()
        return time.monotonic() - start

    def write_file(self, file: Path, cancelled: Callable[[], bool]) -> dict[str, Any]:
        """Write the copy, force it to the disk, and return its manifest entry: size, sha256 and pieces."""
        if self.copy_done:
            self.copy_done.synchronize()
        view, digest = memoryview(self.memory)[: self.size], hashlib.sha256()
        whole = memoryview(self.memory)[: -(-self.size // BLOCK) * BLOCK]
        with _open_direct(file) as fd:
            for offset in range(0, self.size, CHUNK):
                if cancelled():
                    raise InterruptedError(errno.EINTR, "the run ended", str(file))
                digest.update(view[offset : offset + CHUNK])
                _write_all(fd, whole[offset : offset + CHUNK])
            os.ftruncate(fd, self.size)
            os.fsync(fd)
        pieces = [[kind, name, start, view.numel()] for (kind, name, start), view in self.states.items()]
        return {"size": self.size, "sha256": digest.hexdigest(), "pieces": pieces}

    def _grow_memory(self) -> None:
        """Allocate memory for the copy, in huge pages if available; the old memory is freed with its last view."""
        if self.stream and len(self.memory) > BLOCK:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(_address(self.memory)))
        self.memory = mmap.mmap(-1, -(-self.size // BLOCK) * BLOCK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        if self.stream:  # pinned in place: torch would round its size up to a power of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(_address(self.memory), len(self.memory), 0))


def tensor_name(kind: str, name: str, start: int) -> str:
    """The name of a piece's tensor in the safetensors file."""
    return f"{kind}/{name}@{start}"


def _file_header(states: dict[StateKey, Tensor]) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and the offset of each piece in the file, followed by the end of the last.

    Format: https://github.com/huggingface/safetensors#format
    """
    ends = np.cumsum([0, *(4 * view.numel() for view in states.values())]).tolist()
    names = [tensor_name(*state) for state in states]
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
    """A descriptor of a new file, opened with O_DIRECT if the file system supports it."""
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
    """Write all of ``data``; falls back to the page cache where the file system refuses O_DIRECT (EINVAL)."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
