"""Checks and measures every rank's device before training, in about two seconds.

A GPU that computes wrongly, forgets, or runs at half its clock is found here, and not after hours of training. Runs on
a CPU too.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.device_health.preflight_judge import Measurement, judge
from train.distributed import process_group
from train.events import Emit, NoteEvent

COMPUTE_S, NETWORK_S = 1.0, 1.0
"""Seconds that the products, and the all-reduces between hosts, take."""
SIZE = {"cuda": 8192, "cpu": 512}
INNER = 1024
"""Length of the sums in a product of ones and minus ones: they stay below 256, which bfloat16 holds exactly."""
PATTERN_BYTES = {"cuda": 2 << 30, "cpu": 16 << 20}
PATTERNS = (0x55555555, -0x55555556)
"""Each bit is written as one and as zero, beside its opposite."""
REDUCE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
PRODUCTS_A_CHECK = {"cuda": 8, "cpu": 1}


class PreflightFailed(Exception):  # noqa: N818  it is a finding
    """This rank's device must not train; the text says why."""


class DeviceProbe:
    """Measures one device, and checks its results."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size, draw = SIZE[device.type], torch.Generator(device).manual_seed(0)
        shapes = (size, INNER), (INNER, size)
        signs = [torch.randint(0, 2, shape, generator=draw, device=device) * 2 - 1 for shape in shapes]
        self.left, self.right = (sign.to(torch.bfloat16 if device.type == "cuda" else torch.float32) for sign in signs)
        self.expected = signs[0].double() @ signs[1].double().sum(1)

    def multiply(self) -> Tensor:
        """The product of the two matrices, exact whatever the order of its sums."""
        return self.left @ self.right

    def is_wrong(self, product: Tensor) -> bool:
        """Whether any row of a product has another sum than its factors give."""
        return not torch.equal(product.sum(1, dtype=torch.float64), self.expected)

    def measure_products(self, seconds: float) -> tuple[int, int, float]:
        """Multiplies for so long: the products that were checked, those that were wrong, and TFLOP/s."""
        batch, (rows, columns) = PRODUCTS_A_CHECK[self.device.type], (self.left.shape[0], self.right.shape[1])
        checked = wrong = 0
        working = 0.0
        self.is_wrong(self.multiply())  # libraries are loaded and algorithms chosen
        end = time.monotonic() + seconds
        while checked == 0 or time.monotonic() < end:
            self.synchronize()
            began = time.perf_counter()
            for _ in range(batch):
                product = self.multiply()
            self.synchronize()
            working += time.perf_counter() - began
            checked, wrong = checked + 1, wrong + self.is_wrong(product)
        return checked, wrong, 2e-12 * checked * batch * rows * columns * INNER / working

    def count_wrong_words(self) -> int:
        """Writes patterns into memory and counts the words that come back different."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else PATTERN_BYTES["cpu"]
        words = torch.empty(min(PATTERN_BYTES[self.device.type], free // 4) // 4, dtype=torch.int32, device=self.device)
        return sum(int((words.fill_(pattern) != pattern).sum()) for pattern in PATTERNS)

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def check_ranks(
    world: process_group.DistContext, emit: Emit, probe: DeviceProbe | None = None, seconds: float = COMPUTE_S
) -> None:
    """Checks all ranks' devices together: notes on slow ones from rank 0. PreflightFailed on the ranks that err."""
    probe = probe or DeviceProbe(world.device)
    mine = Measurement(world.rank, socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        name = torch.cuda.get_device_name(world.device)
        mine = replace(mine, kind=name, free_mib=free >> 20, memory_mib=total >> 20)
    products, wrong, tflops = probe.measure_products(seconds)
    words = probe.count_wrong_words()
    mine = replace(mine, products=products, wrong_products=wrong, wrong_words=words, tflops=tflops)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    measurements = [Measurement(**record) for record in process_group.gather_objects(mine.to_json())]
    judgement = judge(measurements)
    hosts = len({one.host for one in measurements})
    notes = [*judgement.notes]
    if hosts > 1 and not judgement.failed:
        speed = measure_network(world, min(seconds, NETWORK_S))
        notes.append(f"all-reduce over {world.size} ranks on {hosts} hosts: {speed:.3g} GB/s")
    for note in notes if world.is_rank0 else ():
        emit(NoteEvent(f"preflight: {note}"))
    if world.rank in judgement.failed:
        raise PreflightFailed(f"failed its preflight: {judgement.failed[world.rank]}")


def measure_network(world: process_group.DistContext, seconds: float) -> float:
    """Bandwidth of an all-reduce over all ranks in GB/s, each byte counted as often as it is sent (2 (n - 1) / n)."""
    numbers = torch.zeros(REDUCE_BYTES[world.device.type] // 4, device=world.device)
    dist.all_reduce(numbers)
    repeats, took = 1, 0.0
    while took < seconds / 3:  # all ranks agree on the number of repeats, by the slowest
        began = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(numbers)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        took = max(process_group.gather_objects(time.perf_counter() - began))
        done, repeats = repeats, 2 * repeats
    return 1e-9 * done * numbers.nbytes * 2 * (world.size - 1) / world.size / took
