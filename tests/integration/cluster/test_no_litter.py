"""Runs, sweeps and kills leave nothing in the temporary directory, shared memory or home folder but caches."""

import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import gloo_ranks
from helpers.netns_hosts import HOME, WHY_NOT, hosts

LAUNCH = gloo_ranks.REPOSITORY / "launch.sh"
WHY_NOT = WHY_NOT or ("" if (Path(sys.prefix) / ".ready").exists() else "launch.sh did not make this environment")
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(600)]
USES = {"TRIREME_VENV": sys.prefix}
SETTINGS = ("cluster.workers=2", "tracking.wandb=offline", "generation.prompts=[a]", "eval_every=2", "save_every=0")
FOREVER = ("steps=100000", "eval_every=50")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host of two cores: its /tmp, /dev/shm and home folder are its own, and empty."""
    with hosts(1, shared=tmp_path_factory.getbasetemp(), cores=2) as (a,):
        yield a


@pytest.fixture
def unchanged(host):
    """Fails when files have come to the host's folders during a test; a job that was killed has seconds to clean up."""
    before = files(host)
    yield
    end = time.monotonic() + 30
    while files(host) != before and time.monotonic() < end:
        time.sleep(0.5)
    assert files(host) - before == set()


def files(host) -> set[str]:
    """All files of the folders that only this host has; of the home folder without the documented cache."""
    shown = host.run(["find", "/tmp", "/dev/shm", "/run", HOME, "-xdev"]).stdout.splitlines()
    caches = (f"{HOME}/.cache", f"{HOME}/.cache/trireme")
    return {path for path in shown if path not in caches and not path.startswith(f"{HOME}/.cache/trireme/")}


def launch(host, *words, cwd="/"):
    """A verb of launch.sh to its end, which must be a success."""
    done = host.run([LAUNCH, *words], timeout=240, env=USES, cwd=cwd)
    assert done.returncode == 0, done.stdout


def test_run_with_wandb_and_its_verbs_leave_no_litter(host, unchanged, as_typed, tmp_path):
    launch(host, "train", *as_typed(*SETTINGS, f"data.dir={tmp_path}/corpus"))
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert (tmp_path / "run" / "samples.jsonl").exists()
    launch(host, "evaluate", f"run.dir={tmp_path}/run")
    launch(host, "generate", f"run.dir={tmp_path}/run", "prompt=a")


def test_sweep_of_two_trials_leaves_no_litter(host, unchanged, as_typed, tmp_path):
    words = as_typed(*SETTINGS, "cluster.workers=1", "optimizer.lr=1e-3,1e-2", f"data.dir={tmp_path}/corpus")
    launch(host, "train", "-m", *(word for word in words if not word.startswith("run.dir=")), cwd=tmp_path)
    assert len(list((tmp_path / "sweeps").rglob("*.wandb"))) == 2


@pytest.mark.parametrize("moment", ["started", "stepping"])
def test_killed_driver_leaves_no_litter(moment, host, unchanged, as_typed, tmp_path):
    words = as_typed(*SETTINGS, *FOREVER, f"data.dir={tmp_path}/corpus")
    with (tmp_path / "out").open("w") as out:
        driver = host.start([LAUNCH, "train", *words], stdout=out, stderr=out, env=USES)
    wandb = tmp_path / "run" / "wandb"
    end = time.monotonic() + 120
    while not (
        list(wandb.rglob("*.wandb")) if moment == "stepping" else "  workers " in (tmp_path / "out").read_text()
    ):
        assert driver.poll() is None, (tmp_path / "out").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait(30) == -signal.SIGKILL
    end = time.monotonic() + 60
    while host.pids():
        assert time.monotonic() < end, host.run(["ps", "-ef"]).stdout
        time.sleep(0.1)
