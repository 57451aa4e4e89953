"""Speed by numbers worked out by hand."""

import pytest
import torch

from train.reporting.throughput import (
    TYPICAL_SHARE,
    estimated_seconds,
    matmul_rate,
    peak_flops,
    tokens_per_second,
    utilization,
)


def test_tokens_per_second_is_tokens_over_seconds():
    assert tokens_per_second(4096, 2.0) == 2048
    assert tokens_per_second(4096, 0.0) == 0


@pytest.mark.parametrize(
    ("device", "half", "full"),
    [
        ("NVIDIA GB300", 2500, 80),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA B300 SXM6 AC", 2250, 75),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H800", 989, 67),
        ("NVIDIA H800 PCIe", 756, 51),
        ("NVIDIA H20", 148, 44),
        ("NVIDIA H20-3e", 148, 44),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A800-SXM4-80GB", 312, 19.5),
        ("NVIDIA A30", 165, 10.3),
        ("NVIDIA A40", 149.7, 37.4),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L20", 119.5, 59.8),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
        ("NVIDIA RTX A6000", 154.8, 38.7),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8, 126),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9, 109.7),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480, 120),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 3090 Ti", 80, 40),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("Tesla V100-SXM2-32GB", 125, 15.7),
        ("Tesla T4", 65, 8.1),
        ("AMD Instinct MI300X", 1307, 163.4),
        ("AMD Instinct MI325X", 1307, 163.4),
    ],
)
def test_peak_flops_by_device_name_and_precision(device, half, full):
    assert peak_flops(device, "bf16") == peak_flops(device, "fp16") == pytest.approx(half * 1e12)
    assert peak_flops(device, "fp32") == pytest.approx(full * 1e12)


@pytest.mark.parametrize(
    "device",
    [
        "x86_64 CPU, 2 cores",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A1000",
        "NVIDIA GB10",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb",
    ],
)
def test_peak_flops_of_an_unknown_device_or_of_a_part_of_one_is_none(device):
    assert peak_flops(device, "bf16") is None
    assert peak_flops(device, "fp32") is None
    assert utilization(1000, 1e9, 1, None) is None


def test_utilization_is_model_flops_over_peak_flops():
    # 8 devices of 1e15 FLOP/s; 4e6 tokens a second of 1e9 FLOPs each: half of what they can do
    assert utilization(4e6, 1e9, 8, 1e15) == pytest.approx(0.5)


def test_estimated_seconds_are_flops_over_the_measured_rate():
    assert estimated_seconds(1e12, 2, 1e11) == pytest.approx(5 / TYPICAL_SHARE)
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, 0.005) < 1e14
