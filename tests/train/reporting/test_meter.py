"""The meter's numbers, worked out by hand, and those of a real run."""

import json
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks

from train.reporting.meter import DeviceRates, Meter, percentile

KEYS = {"tokens_per_s", "tokens_per_s_per_worker", "mfu_measured", "step_s_p50", "step_s_p99"}


@pytest.mark.parametrize(
    ("values", "median", "most"),
    [([], 0, 0), ([3.0], 3, 3), ([1.0, 9.0], 1, 9), ([*map(float, range(1, 201))], 100, 198)],
)
def test_percentile_is_that_of_the_nearest_rank(values, median, most):
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (median, most)


def test_record_is_of_its_steps_and_summary_of_all():
    # 2 devices; a token takes 1e9 FLOPs, a device does 1e12 by its data sheet and 5e11 when measured
    meter = Meter(DeviceRates(1e9, 2, 1e12, 5e11), torch.device("cpu"))
    assert meter.summary() == {}
    record = meter.record(600, [0.5, 0.1])
    assert record == {
        "tokens_per_s": 1000,
        "tokens_per_s_per_worker": 500,
        "mfu": 0.5,
        "mfu_measured": 1.0,
        "step_s_p50": 0.1,
        "step_s_p99": 0.5,
    }
    meter.record(300, [0.6])
    assert meter.summary()["tokens_per_s"] == 750
    assert meter.summary()["step_s_p99"] == 0.6


def test_device_without_a_data_sheet_has_no_mfu_but_of_the_measured_rate():
    record = Meter(DeviceRates(1e9, 1, None, 1e12), torch.device("cpu")).record(100, [1.0])
    assert record.keys() == KEYS
    assert record["mfu_measured"] == 0.1


def test_run_logs_speed_of_the_steps_since_the_last_record_and_sums_it_up(make, corpus):
    config = make("cluster.workers=2", "log_every=4", "eval_every=0", "save_every=0")
    assert gloo_ranks.train_world(config, corpus) == ["done"] * 2
    lines = (Path(config.run.dir or "") / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2
    for record in records:
        assert record.keys() >= KEYS
        assert not {"mfu", "gpu_peak_gib"} & record.keys()
        assert 0 < record["step_s_p50"] <= record["step_s_p99"]
        assert record["tokens_per_s"] == pytest.approx(
            2 * record["tokens_per_s_per_worker"], abs=0.16
        )  # both are rounded
        assert 0 < record["mfu_measured"] < 1
    summary = json.loads((Path(config.run.dir or "") / "summary.json").read_text())
    speeds = [record["tokens_per_s"] for record in records]
    assert summary.keys() >= KEYS
    assert min(speeds) <= summary["tokens_per_s"] <= max(speeds)
