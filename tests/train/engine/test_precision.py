"""The choice of a precision, as tables of devices; and that a run keeps the one it began with."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import gloo_ranks

from train.distributed.device import Device, describe
from train.engine.precision import choose_precision
from train.errors import UserError
from train.reporting.run_outline import precision_cost

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", bf16=True)
T4 = Device("cuda", "Tesla T4", bf16=False)
NEW_CPU, OLD_CPU = Device("cpu", "x86_64 CPU, 64 cores", bf16=True), Device("cpu", "x86_64 CPU, 4 cores", bf16=False)


@pytest.mark.parametrize(
    ("asked", "kept", "devices", "name", "why"),
    [
        ("auto", None, [H100, H100], "bf16", "auto: every worker's device has it"),
        ("auto", None, [NEW_CPU], "bf16", "auto: every worker's device has it"),
        ("auto", None, [OLD_CPU], "fp32", "auto: rank 0's x86_64 CPU, 4 cores has no bf16 instructions"),
        ("auto", None, [H100, T4, T4], "fp32", "auto: rank 1's Tesla T4 (and 1 more) has no bf16 instructions"),
        ("auto", "fp32", [H100], "fp32", "with which the run began"),
        ("auto", "bf16", [NEW_CPU, OLD_CPU], "bf16", "with which the run began; rank 1's x86_64 CPU, 4 cores has no "),
        ("fp32", "bf16", [H100], "fp32", "precision=fp32"),
        ("bf16", None, [OLD_CPU], "bf16", "precision=bf16; rank 0's x86_64 CPU, 4 cores has no instructions for it"),
        ("fp16", None, [T4], "fp16", "precision=fp16"),
    ],
)
def test_precision_is_that_asked_for_or_kept_or_the_best_of_all(asked, kept, devices, name, why):
    choice = choose_precision(asked, kept, devices)
    assert choice.name == name
    assert choice.why.startswith(why)


@pytest.mark.parametrize(("asked", "kept"), [("bf16", None), ("auto", "bf16")])
def test_gpu_that_lacks_the_precision_is_named_with_the_cure(asked, kept):
    with pytest.raises(UserError, match=r"rank 1's Tesla T4 has none: .*precision=fp16"):
        choose_precision(asked, kept, [H100, T4])


@pytest.mark.parametrize(
    ("device", "precision", "words"),
    [
        (H100, "fp32", ["67 TFLOP/s here instead of 989", "precision=bf16"]),
        (T4, "fp32", ["8.1 TFLOP/s here instead of 65", "precision=fp16"]),
        (Device("cuda", "a new one", bf16=True), "fp32", ["tensor cores, and", "precision=bf16"]),
        (H100, "bf16", None),
        (NEW_CPU, "fp32", None),
    ],
)
def test_fp32_on_a_gpu_says_what_it_costs(device, precision, words):
    text = precision_cost(device, precision)
    assert (text is None) == (words is None)
    assert all(word in (text or "") for word in words or [])


def test_this_cpu_is_said_to_have_bf16_as_the_kernel_says():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert describe(torch.device("cpu")).bf16 == bool(flags & {"avx512_bf16", "amx_bf16"})


def saved_precision(config) -> str:
    return yaml.safe_load((Path(config.run.dir) / "config.yaml").read_text())["precision"]["name"]


def test_run_keeps_the_precision_that_it_began_with_and_says_no_change(make, corpus):
    first = make("cluster.workers=2", "precision=auto", "steps=2")
    assert gloo_ranks.train_world(first, corpus) == ["done"] * 2
    assert saved_precision(first) == ("bf16" if describe(torch.device("cpu")).bf16 else "fp32")
    for name in ("fp32", "bf16"):  # one of them is not what this machine would choose
        begun = make(f"precision={name}", "cluster.workers=2", "steps=2", name=name)
        gloo_ranks.train_world(begun, corpus)
        longer = make("precision=auto", "cluster.workers=2", "steps=3", name=name)
        rank0, _ = gloo_ranks.start(2, gloo_ranks.train, gloo_ranks.configuration.to_dict(longer), str(corpus)).wait()
        assert rank0.result == "done"
        assert saved_precision(longer) == name
        [plan] = [event for event in rank0.events if event["event"] == "plan"]
        assert (plan["precision"], plan["precision_why"].partition(";")[0]) == (name, "with which the run began")
        assert not any("precision" in event.get("text", "") for event in rank0.events)
