"""A driver for tests: ``python drive.py RUN_DIR FAULT_JSON [cluster settings as JSON]`` runs the toy rank as a job."""

import json
import sys

from cluster import launch
from train import config as configuration

if __name__ == "__main__":
    run_dir, fault, *settings = sys.argv[1:]
    base = configuration.to_dict(configuration.load([f"run.dir={run_dir}", "steps=5", "schedule.warmup=0"]))
    more = json.loads(settings[0]) if settings else {}
    values = {**base, "steps": more.pop("steps", 5), "cluster": {**base["cluster"], **more}}
    sys.exit(
        launch.run(
            launch.Plan(lambda: configuration.parse(values), lambda config, report: fault, target="toy:train_rank")
        )
    )
