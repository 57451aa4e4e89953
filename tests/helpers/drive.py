"""A driver for tests: ``python drive.py RUN_DIR FAULT_JSON [more settings as JSON]`` runs the toy rank as a job."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.driver.early_start import start_early
from cluster.host.stop_request import StopSignals
from train.util import streams


def raise_error(*_):
    raise RuntimeError("the oar broke")


if __name__ == "__main__":
    streams.guard_report()
    signals = StopSignals()
    signals.install()
    begun = start_early(signals, "helpers.toy:train_rank")

    from cluster.driver.train_driver import TrainDriver
    from train.config import load as configuration

    run_dir, fault, *settings = sys.argv[1:]
    base = configuration.to_dict(configuration.load([f"run.dir={run_dir}", "steps=5", "schedule.warmup=0"]))
    more = json.loads(settings[0]) if settings else {}
    if more.pop("bug", False):
        TrainDriver._finish = raise_error
    values = {**base, "steps": more.pop("steps", 5), "cluster": {**base["cluster"], **more}}

    class ToyDriver(TrainDriver):
        def load_config(self):
            return configuration.parse(values)

        def find_corpus(self, config):
            return fault

    sys.exit(ToyDriver([], begun).main())
