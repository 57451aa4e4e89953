"""Jobs of real workers, forked for real agents on a real private Ray cluster that the cases share."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from helpers.ray_cluster import private

from cluster.host.stop_request import StopRequest
from cluster.supervision import attempt, attempt_state
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.supervisor import Supervisor
from cluster.supervision.timeouts import KILL_REPORT_S
from train.config import load as configuration
from train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
TESTS = REPOSITORY / "tests"
TARGET = "helpers.toy:train_rank"


@pytest.fixture(scope="module")
def job_folder():
    """Job folder of a private cluster of two cores, with its host's fork server."""
    with private(2, TARGET, REPOSITORY, TESTS) as cluster:
        yield cluster.spec.folder


class JobRun:
    """A job on the shared cluster, with the events that it showed."""

    def __init__(self, folder, tmp_path, fault=None, steps=5, **cluster):
        base = configuration.to_dict(
            configuration.load([f"run.dir={tmp_path}/run", "schedule.warmup=0", "cluster.workers=2"])
        )
        values = {**base, "steps": steps, "cluster": {**base["cluster"], "max_failures": 0, **cluster}}
        (tmp_path / "run" / "logs").mkdir(parents=True)
        self.events = []
        self.stop = StopRequest()
        config = configuration.parse(values)
        self.clock = StartupClock(time.time())
        corpus = json.dumps(fault or {})
        job = Job(config, corpus, TARGET, folder.name, self.events.append, self.stop, self.clock)
        self.supervisor = Supervisor(job, "cpu")

    def go(self):
        try:
            return self.supervisor.run()
        finally:
            self.supervisor.release_slots()

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]

    def pids(self):
        return self.of("started")[-1]["pids"]


def wait_until(condition, seconds=30):
    """Waits in this thread until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def in_thread(action):
    """Runs ``action`` in another thread; pytest reports its exceptions."""
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_job_runs_to_its_end_and_its_start_is_timed_by_phase(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path)
    assert run.go().kind == "done"
    assert [event["step"] for event in run.of("step")] == [1, 2, 3, 4, 5]
    assert run.of("done")[0]["summary"] == {"step": 5}
    marks = run.clock.marks
    assert (
        marks["workers"]
        <= marks["start"]
        <= marks["connected"]
        <= marks["engine"]
        <= marks["first_step"]
        <= marks["train"]
    )
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in run.pids()), 5)


def test_killed_rank_is_named_first_and_the_others_are_folded(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": 3, "do": "kill"})
    began = time.monotonic()
    assert run.go().kind == "failed"
    assert time.monotonic() - began < 30  # gloo alone would wait half an hour; on a quiet machine it is 2 s
    [failure] = run.of("failure")
    assert (
        failure["lines"][0]
        == f"rank 1 on {socket.gethostname()} (pid {run.pids()[1]}) killed by SIGKILL in data of step 3"
    )
    assert "  rank 1 is about to kill" in failure["lines"]
    assert failure["lines"][-1].startswith("rank 0 fell with it")
    assert failure["next"] == "giving up: cluster.max_failures=0 allows no restart"


def test_raising_rank_is_reported_with_its_traceback_first(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": 2, "do": "raise"})
    assert run.go().kind == "failed"
    lines = run.of("failure")[0]["lines"]
    assert "rank 1" in lines[0]
    assert "raised ValueError" in lines[0]
    assert "ValueError: the oar broke" in lines
    assert lines[-1].startswith("rank 0 fell with it")


def test_bad_input_on_every_rank_is_one_message(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": "all", "step": 1, "do": "refuse"}, max_failures=3)
    verdict = run.go()
    assert verdict.kind == "bad_input"
    assert verdict.cause.error == "the corpus is not the one that this run began with"
    assert not run.of("failure")


def test_failed_attempt_is_followed_by_one_that_resumes(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": 3, "do": "kill", "times": 2}, max_failures=2)
    assert run.go().kind == "done"
    starts = [event["start_step"] for event in run.of("plan")]  # of an attempt killed at once rank 0 may not have told
    assert (starts[0], {*starts[1:]}) == (0, {2})
    assert [event["step"] for event in run.of("step")] == [1, 2, 3, 4, 5]
    nexts = [failure["next"] for failure in run.of("failure")]
    counted = [text[text.index("(") :] for text in nexts]
    assert counted == ["(restart 1 of 2 without progress)", "(restart 2 of 2 without progress)"]
    assert "starting again in 1 s" in nexts[1]
    [recovered] = run.of("recovered")  # the second start reached no step
    assert (recovered["workers"], recovered["fault"], recovered["generation"]) == (2, "killed", 2)
    assert recovered["failed"] < recovered["ended"] < recovered["start"] < recovered["first_step"] < recovered["train"]


def test_restarts_end_at_max_failures(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 0, "step": 2, "do": "kill"}, max_failures=1)
    assert run.go().kind == "failed"
    assert [failure["again"] for failure in run.of("failure")] == [True, False]
    assert "cluster.max_failures=1" in run.of("failure")[1]["next"]


def test_same_failure_twice_is_not_tried_a_third_time(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 0, "step": 2, "do": "exit"}, max_failures=5)
    assert run.go().kind == "failed"
    assert [failure["again"] for failure in run.of("failure")] == [True, False]
    assert "failed twice in the same way" in run.of("failure")[1]["next"]
    assert "exited with code 7 without a word" in run.of("failure")[0]["lines"][0]


def test_sigterm_to_one_worker_stops_the_job_after_saving(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"sleep": 0.05}, steps=1000)

    def terminate():
        wait_until(lambda: len(run.of("step")) > 2)
        os.kill(run.pids()[1], signal.SIGTERM)

    other = in_thread(terminate)
    verdict = run.go()
    other.join()
    assert (verdict.kind, verdict.fault) == ("stopped", "preempted")
    assert "rank 1 on" in run.of("note")[0]["text"]
    assert "was told to end: saving" in run.of("note")[0]["text"]


def test_preempted_worker_leaves_a_job_that_goes_on_with_fewer(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"sleep": 0.05}, steps=60, min_workers=1)

    def terminate():
        wait_until(lambda: len(run.of("step")) > 2)
        os.kill(run.pids()[1], signal.SIGTERM)

    other = in_thread(terminate)
    assert run.go().kind == "done"
    other.join()
    assert [len(event["pids"]) for event in run.of("started")] == [2, 1]
    steps = [event["step"] for event in run.of("step")]
    assert steps == sorted(set(steps)), "it saved, so no step is made twice"
    assert "going on with 1 of 2 workers" in run.of("note")[1]["text"]
    assert not run.of("failure")


def test_job_grows_after_a_checkpoint_when_the_worker_is_back(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"sleep": 0.05}, steps=100_000, min_workers=1, grow_after=1, stay_away=1)

    def play():
        wait_until(lambda: len(run.of("step")) > 2)
        os.kill(run.pids()[1], signal.SIGTERM)
        wait_until(lambda: len(run.of("recovered")) == 2, 120)
        run.stop.request(signal.SIGTERM)

    other = in_thread(play)
    assert run.go().kind == "stopped"
    other.join()
    assert [len(event["pids"]) for event in run.of("started")] == [2, 1, 2]
    steps = [event["step"] for event in run.of("step")]
    assert steps == list(range(1, steps[-1] + 1)), "no step is lost or made twice"
    assert [event["fault"] for event in run.of("recovered")] == ["preempted", "more workers"]


def test_job_told_to_stop_ends_though_it_could_go_on_smaller(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"sleep": 0.05}, steps=1000, min_workers=1)

    def terminate():
        wait_until(lambda: len(run.of("step")) > 2)
        os.kill(run.pids()[1], signal.SIGTERM)
        time.sleep(0.5)  # a batch system's signal reaches the driver last
        run.stop.request(signal.SIGTERM)

    other = in_thread(terminate)
    assert run.go().kind == "stopped"
    other.join()
    assert len(run.of("started")) == 1


@pytest.mark.parametrize("fault", ["hang", "stop"])
def test_hung_rank_is_named_with_its_stack_and_where_others_wait(job_folder, tmp_path, fault):
    broken = {"rank": 1, "step": 3, "do": fault, "times": 1, "sleep": 0.05}
    run = JobRun(job_folder, tmp_path, broken, steps=30, max_failures=1, hang_timeout=2)
    seen = []
    show = run.supervisor.console
    run.supervisor.console = lambda event: (seen.append((time.time(), event["event"])), show(event))
    assert run.go().kind == "done"
    [failure] = run.of("failure")
    title, *lines = failure["lines"]
    assert title.startswith(
        f"rank 1 on {socket.gethostname()} (pid {run.of('started')[0]['pids'][1]}) hung: nothing moved for "
    )
    assert title.endswith("in data of step 3")
    assert any(line.startswith("rank 0 waits in all_reduce_sum #") for line in lines)
    joined = [line for line in lines if line.endswith("of the default group (1), which rank 1 did not join")]
    assert len(joined) == 1, lines
    assert joined[0].startswith("rank 0 waits in gloo:all_reduce #")
    assert (tmp_path / "run" / "logs" / "rank_1.flight.jsonl").exists()
    stack = lines[lines.index("its stack, innermost first:") + 1 :]
    assert any("toy.py" in line and "in _fail" in line for line in stack)
    if fault == "stop":
        assert "it is stopped by a signal (SIGSTOP, or a debugger)" in lines
        assert any(line.startswith("kernel: state T: stopped by a signal") for line in lines)
    assert lines[-1] == "rank 0 fell with it (ended by the driver)"
    hung_at = (tmp_path / "run" / "failed_1").stat().st_mtime
    assert next(t for t, kind in seen if kind == "failure") - hung_at < 2 + 5
    assert run.of("plan")[1]["start_step"] >= 2  # one that was stopped makes some steps more while it writes its stack


def test_flight_record_names_the_rank_where_heartbeats_cannot(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": 3, "do": "wedge"}, hang_timeout=2)
    verdict = run.go()
    assert (verdict.kind, verdict.fault, verdict.cause.rank) == ("failed", "hung", 1)
    title, *lines = run.of("failure")[0]["lines"]
    assert "hung: nothing moved for " in title
    assert lines[0].startswith("rank 0 waits in gloo:all_reduce #")
    assert lines[0].endswith("which rank 1 did not join")
    assert "in _fail" in "".join(lines[lines.index("its stack, innermost first:") :])


def test_slow_rank_is_named_and_the_job_goes_on(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": "all", "do": "dawdle"}, steps=100)
    assert run.go().kind == "done"
    [note] = run.of("note")
    assert f"rank 1 on {socket.gethostname()} is slow: it works " in note["text"]
    line = json.loads((tmp_path / "run" / "ranks.jsonl").read_text().splitlines()[0])
    assert line["slowest_rank"] == 1
    assert 0 <= line["rank_step_s_min"] < 0.05 < line["rank_step_s_max"] < 1


def test_out_of_memory_is_named_with_a_cure(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": 2, "do": "devour"})
    verdict = run.go()
    assert (verdict.kind, verdict.fault, verdict.cause.rank) == ("failed", "out of host memory", 1)
    lines = run.of("failure")[0]["lines"]
    assert any("it held at most" in line for line in lines)
    assert any(line.startswith("cure: use a smaller batch.micro") for line in lines)


def test_dead_agent_is_replaced_for_the_next_attempt(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"sleep": 0.05}, steps=60, max_failures=1)
    agents = []

    def kill_agent():
        wait_until(lambda: len(run.of("step")) > 2)
        agents.extend(slot.info.pid for slot in run.supervisor.slots.up_slots())
        located = json.loads((tmp_path / "run" / "world.json").read_text())["ranks"]
        assert [where["steward"] for where in located] == [agents[0]] * 2  # one agent for both workers of the host
        os.kill(agents[0], signal.SIGKILL)

    other = in_thread(kill_agent)
    assert run.go().kind == "done"
    other.join()
    [failure] = run.of("failure")
    assert failure["lines"][0].startswith(
        f"rank 0 on {socket.gethostname()} (pid {agents[0]}) was lost with its steward"
    )
    assert failure["lines"][-1] == "rank 1 fell with it (its error follows from this one)"


def test_agent_that_speaks_for_no_worker_may_die(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"sleep": 0.05}, steps=40)

    def kill_agent():
        wait_until(lambda: len(run.of("step")) > 2)
        os.kill(run.supervisor.slots.up_slots()[1].info.pid, signal.SIGKILL)

    other = in_thread(kill_agent)
    assert run.go().kind == "done"
    other.join()
    assert not run.of("failure")


def test_taken_port_is_refused_with_the_cure(job_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cluster.port={port} .*in use.*[\s\S]*cluster.port=0"):
            JobRun(job_folder, tmp_path, port=port).go()


def test_private_cluster_listens_on_the_loopback_only(job_folder):
    ours = {p.pid for p in psutil.Process().children(recursive=True)} | {os.getpid()}
    listening = [c for c in psutil.net_connections("tcp") if c.pid in ours and c.status == psutil.CONN_LISTEN]
    assert listening
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
    assert (job_folder / "token").stat().st_mode & 0o777 == 0o600
    assert job_folder.stat().st_mode & 0o777 == 0o700


def test_death_of_the_fork_server_fails_one_attempt_only(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"sleep": 0.05}, steps=60, max_failures=1)

    def kill_fork_server():
        wait_until(lambda: len(run.of("step")) > 2)
        psutil.Process(run.pids()[0]).parent().kill()

    other = in_thread(kill_fork_server)
    assert run.go().kind == "done"
    other.join()
    assert "the warm process that it was forked from ended" in run.of("failure")[0]["lines"][0]
    assert run.of("plan")[-1]["start_step"] > 0


def test_killed_worker_that_ends_late_is_not_a_lost_network(job_folder, tmp_path):
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": 3, "do": "wedge"}, hang_timeout=2)

    def delay_exits():
        wait_until(lambda: run.of("step") and (tmp_path / "run" / "failed_1").exists())
        workers = [psutil.Process(pid) for pid in run.pids()]
        fork_server = workers[0].parent()
        fork_server.suspend()  # it reports no exit, and the agents answer that there is nothing new
        try:
            wait_until(lambda: all(worker.status() == psutil.STATUS_ZOMBIE for worker in workers))
            time.sleep(KILL_REPORT_S + 2)
            assert all(slot.info is not None for slot in run.supervisor.slots.all)
        finally:
            fork_server.resume()

    other = in_thread(delay_exits)
    began = time.monotonic()
    verdict = run.go()
    other.join()
    assert (verdict.kind, verdict.fault) == ("failed", "hung")
    assert verdict.cause is not None
    assert verdict.cause.rank == 1  # by the collective that it did not join, whoever ended first or last
    assert time.monotonic() - began > KILL_REPORT_S + 2
    assert "host has not answered" not in json.dumps(run.of("failure"))


def test_killed_worker_that_never_ends_is_no_cause_and_its_agent_stays(job_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(attempt_state, "TEARDOWN_S", 1.5)
    run = JobRun(job_folder, tmp_path, {"rank": 1, "step": 3, "do": "wedge"}, hang_timeout=2)

    agents, show = [], run.supervisor.console

    def look_at_agents(event):
        if event["event"] == "failure":
            agents.extend(slot.info for slot in run.supervisor.slots.all)
        show(event)

    run.supervisor.console = look_at_agents

    def keep_exits():
        wait_until(lambda: run.of("step") and (tmp_path / "run" / "failed_1").exists())
        fork_server = psutil.Process(run.pids()[0]).parent()
        fork_server.suspend()
        try:
            wait_until(lambda: run.of("failure"))
        finally:
            fork_server.resume()

    other = in_thread(keep_exits)
    verdict = run.go()
    other.join()
    assert (verdict.kind, verdict.fault) == ("failed", "hung")
    assert verdict.cause is not None
    assert verdict.cause.rank == 1  # by the collective that it did not join, whoever ended first or last
    notes = [note["text"] for note in run.of("note")]
    assert len(notes) == 2
    assert all("was killed and has not ended" in note for note in notes)
    assert [agent is not None for agent in agents] == [True, True]


def test_all_answers_that_are_there_are_taken_at_once(job_folder):
    answers = [ray.put(n) for n in range(300)]
    assert len(attempt.take_ready(answers, 5.0)) == 300
    began = time.monotonic()

    @ray.remote(num_cpus=0)
    def late():
        time.sleep(60)

    waiting = late.remote()
    assert attempt.take_ready([waiting], 0.2) == []
    assert time.monotonic() - began < 30
    assert set(attempt.take_ready([waiting, *answers], 0.2)) == set(answers)
    ray.cancel(waiting, force=True)


def test_variables_of_driver_and_configuration_reach_every_rank(job_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("NCCL_AUTH_TOKEN", "do-not-forward")
    run = JobRun(job_folder, tmp_path, {"rank": "all", "step": 2, "do": "environment"}, env={"NCCL_PROTO": "Simple"})
    assert run.go().kind == "done"
    seen = [json.loads((tmp_path / "run" / f"environment_{rank}").read_text()) for rank in (0, 1)]
    names = ("NCCL_ALGO", "NCCL_PROTO", "TORCH_GLOO_LAZY_INIT", "NCCL_AUTH_TOKEN", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")
    for env in seen:
        assert [env.get(name) for name in names] == ["Ring", "Simple", "1", None, "", "2"]
