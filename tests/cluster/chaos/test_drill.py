"""The drill: its verdicts as pure functions, and all of its faults for real, on one host and on three."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import gloo_ranks
from helpers.netns_hosts import PORT, WHY_NOT, form_cluster, hosts, living_hosts, trireme

from cluster.chaos import drill as drill_verb
from cluster.chaos import faults
from cluster.chaos.faults import FAULTS, Observation, Row
from cluster.chaos.inject import copy_with_damaged_shard
from train.data.corpus.shards import Corpus
from train.errors import UserError
from train.run_dir.compare import Comparison

SAME = [Comparison(what, 10, None) for what in ("loss", "grad_norm", "lr", "tokens", "data_hash")]
SEEN = Observation(0.5, 1.5, 3, "rank 1 on a (pid 7) killed by SIGKILL", True, 10)
LOSSES = {1: 2.0, 2: 1.0}


def judged(fault="kill", seen=SEEN, comparisons=SAME, ours=LOSSES) -> Row:
    return faults.judge_fault(FAULTS[fault], seen, comparisons, "fp32", (ours, LOSSES))


def different(what: str) -> list[Comparison]:
    return [Comparison(f.subject, f.compared, "step 3: 1 and 2") if f.subject == what else f for f in SAME]


def test_row_of_a_named_and_survived_fault_holds():
    row = judged()
    assert row.holds
    assert row.cells == ("a worker killed", "0.5", "yes", "1.5", "3", "yes", "bit for bit")
    assert row.remark == ""


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (judged(seen=Observation(None, 1.5, 3, "something else", False, 10)), "not named right, but: something else"),
        (judged(comparisons=different("data_hash")), "data_hash: step 3: 1 and 2"),
        (judged(comparisons=different("loss")), "loss: step 3: 1 and 2"),
        (judged(comparisons=different("grad_norm")), "grad_norm: step 3: 1 and 2"),
        (judged("size", ours={1: 2.0, 2: 1.001}), "loss: step 2: 1.001 and 1.0"),
        (judged("size", ours={1: 2.0}), "loss: step 2: None and 1.0"),
        (judged("size", ours={1: 2.0, 2: float("nan")}), "loss: step 2: nan and 1.0"),
        (judged("size", comparisons=different("data_hash")), "data_hash: step 3"),
        (Row("kill", "a worker killed", failed="the run ended"), "a worker killed: the run ended"),
    ],
)
def test_row_that_does_not_hold_gives_the_reason(row: Row, words: str):
    assert not row.holds
    assert words in row.remark
    assert words in faults.markdown([row], "x")


def test_losses_after_a_resize_may_differ_by_the_order_of_sums():
    row = judged("size", comparisons=different("loss"), ours={1: 2.0, 2: 1.00005})
    assert row.holds
    assert row.cells[-1] == "within 0.0001"


def test_losses_long_after_the_first_difference_are_not_compared():
    steps = range(1, 201)
    amplified = {step: 1.0 if step < 10 else 1.0 + 1e-6 * 1.05 ** (step - 10) for step in steps}
    whole = dict.fromkeys(steps, 1.0)
    assert abs(amplified[200] - 1.0) > 1e-3
    assert faults.compare_losses(amplified, whole, 1e-4) == ""
    assert faults.compare_losses({**amplified, 30: 1.001}, whole, 1e-4).startswith("loss: step 30")


def test_impossible_fault_is_shown_with_its_reason():
    assert faults.why_impossible(FAULTS["cut"], 4, "one host") == "one host"
    assert faults.why_impossible(FAULTS["kill"], 1, "one host") == ""
    assert "one worker" in faults.why_impossible(FAULTS["size"], 1, "")
    row = Row("cut", "a host cut off", impossible="one host")
    assert "not possible here" in row.cells
    assert row.remark == "a host cut off: not possible here: one host"


def test_parse_faults_keeps_the_order_of_injection():
    assert [fault.name for fault in faults.parse_faults("stop,kill")] == ["kill", "stop"]
    with pytest.raises(KeyError, match="flood"):
        faults.parse_faults("kill,flood")


def test_pattern_of_a_fault_matches_its_own_victim_only():
    where = {"rank": 1, "host": "a.b", "pid": 7}
    said = "FAILED: rank 1 on a.b (pid 7) killed by SIGKILL in forward of step 4"
    assert FAULTS["kill"].pattern(where).search(said)
    for other in ({"rank": 0}, {"host": "axb"}, {"pid": 77}):
        assert not FAULTS["kill"].pattern({**where, **other}).search(said)


@pytest.mark.parametrize("inside", ["", "  it is in all_reduce #112\n"])
def test_pattern_of_stop_matches_with_or_without_a_collective(inside: str):
    hung = "FAILED: rank 1 on a (pid 7) hung: nothing moved in step of step 28\n"
    said = f"{hung}{inside}  it is stopped by a signal (SIGSTOP)\n"
    pattern = FAULTS["stop"].pattern({"rank": 1, "host": "a", "pid": 7})
    assert pattern.search(said)
    assert not pattern.search(said.replace("  it is stopped by a signal", "  rank 0 waits"))


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir()) if file.is_file()
    }


def test_damaged_shard_is_in_a_copy_and_the_corpus_stays_whole(corpus: Path, tmp_path: Path):
    before = digests(corpus)
    shard, copy = copy_with_damaged_shard(corpus, tmp_path / "copy")
    assert digests(corpus) == before
    with pytest.raises(UserError, match=f"{shard}: damaged"):
        Corpus(copy).split("train").document(0)


# ------------------------------------------------------------------------------------------------------------- for real


SETTINGS = [
    "batch.global=12",
    "batch.seq_len=32",
    "optimizer.lr=1e-3",
    "steps=20000",
    "zero=2",
    "cluster.hang_timeout=5",
]


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def run_drill(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", "drill", *words]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        cwd=gloo_ranks.REPOSITORY,
        check=False,
    )


@pytest.mark.timeout(900)
def test_drill_with_two_workers_of_one_host_survives_every_fault(as_typed, corpus: Path, tmp_path: Path):
    before = digests(corpus)
    done = run_drill(*as_typed("cluster.workers=2", *SETTINGS))
    assert done.returncode == 0, done.stdout
    assert digests(corpus) == before, "the corpus is not touched"
    assert [path.name for path in tmp_path.iterdir()] == ["run-drill"], "nor is the run"
    content = json.loads((tmp_path / "run-drill" / "drill.json").read_text())
    rows = {row["fault"]: row for row in content["faults"]}
    assert content["holds"]
    assert {name for name, row in rows.items() if row["holds"]} == FAULTS.keys() - {"host", "cut"}
    assert all("lasting cluster" in rows[name]["impossible"] for name in ("host", "cut"))
    assert {rows[name]["seen"]["steps_redone"] for name in ("term", "shard", "size")} == {0}, "these save first"
    assert rows["checkpoint"]["seen"]["steps_redone"] >= 5, "the checkpoint before the damaged one was used"
    table = (tmp_path / "run-drill" / "drill.md").read_text()
    assert table.count("| bit for bit |") == 7
    assert table.count("| within 0.0001 |") == 1


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.timeout(900)
def test_drill_on_three_hosts_survives_a_lost_and_a_cut_off_host(as_typed, tmp_path_factory, tmp_path: Path):
    with hosts(3, shared=tmp_path_factory.getbasetemp()) as (a, b, c):
        form_cluster(a, b, c)
        words = as_typed("cluster.workers=3", "cluster.address=auto", *SETTINGS)
        done = trireme(a, "drill", "faults=kill,host,cut", *words, timeout=800, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        content = json.loads((tmp_path / "run-drill" / "drill.json").read_text())
        assert [(row["fault"], row["holds"]) for row in content["faults"]] == [
            ("kill", True),
            ("host", True),
            ("cut", True),
        ]
        assert "was lost with its host" in content["faults"][1]["seen"]["words"]
        assert "was cut off" in content["faults"][2]["seen"]["words"]
        wait_for(
            lambda: living_hosts(a, f"{a.ip}:{PORT}") == {a.ip, b.ip, c.ip}, 120
        )  # the drill leaves the cluster as it was


def test_drill_refuses_bad_input_and_lists_its_faults(as_typed, capsys: pytest.CaptureFixture[str]):
    for words, said in (
        (["faults=kill,flood"], "there is no fault 'flood'"),
        ([*as_typed("lerning_rate=1")], "lerning_rate"),
        ([*as_typed("steps=8")], "too short for a drill"),
    ):
        assert drill_verb.run(words) == 2
        assert said in capsys.readouterr().err
    assert drill_verb.run(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(fault.title in listed for fault in FAULTS.values())


def test_interrupted_drill_leaves_no_process_behind(as_typed, tmp_path: Path):
    mark = f"TRIREME_DRILL={tmp_path}"
    name, _, value = mark.partition("=")
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "drill", *as_typed("cluster.workers=2", *SETTINGS)],
            env={**os.environ, name: value},
            cwd=gloo_ranks.REPOSITORY,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    log = tmp_path / "run-drill" / "undisturbed.log"
    wait_for(lambda: (log.exists() and "Trireme" in log.read_text()) or process.poll() is not None, 120)  # Ray is up
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "out").read_text()
    assert "The drill was stopped" in (tmp_path / "out").read_text()
    wait_for(lambda: not processes_with(mark), 30)


def processes_with(mark: str) -> list[str]:
    """Command lines of the living processes whose environment has ``mark``."""
    commands = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                commands.append((process / "cmdline").read_text())
        except OSError:
            continue
    return commands
