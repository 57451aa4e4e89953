"""A real rank to run in tests: a loop of gloo all-reduces that emits events, and fails in a given way."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

import torch

from train.distributed import heartbeat, process_group
from train.errors import Stopped, UserError
from train.events import DoneEvent, PhaseEvent, PlanEvent, SaveEvent, StepEvent
from train.util.io import write_whole


def train_rank(config, corpus, context, emit, should_stop):
    """Counts to ``config.steps`` with the other ranks.

    ``corpus`` is JSON, {"rank": r, "step": n, "do": fault, "times": k, "sleep": s}: which rank fails at which
    step in which of the ways below, how often, and the seconds that a step takes.
    """
    fault = json.loads(corpus)
    progress = Path(config.run.dir) / "progress"
    start = int(progress.read_text()) if progress.exists() else 0
    emit(PhaseEvent.now("engine"))
    emit(PlanEvent(params=1234, tokens=1000, steps=config.steps, start_step=start))
    emit(PhaseEvent.now("first_step"))
    for step in range(start + 1, config.steps + 1):
        heartbeat.set_step(step)
        heartbeat.enter_phase("data")
        _fail(fault, context, step, Path(config.run.dir))
        heartbeat.enter_phase("step")
        assert process_group.all_reduce_sum([1.0]) == [context.size]
        if step == start + 1:
            emit(PhaseEvent.now("train"))
        emit(StepEvent(config.steps, step, {"loss": 1.0 / step, "tokens_per_s": 10.0}))
        if context.is_rank0:
            write_whole(progress, str(step).encode())
            emit(SaveEvent(step))
        if process_group.all_reduce_sum([float(should_stop())])[0]:
            raise Stopped
        time.sleep(fault.get("sleep", 0.0))
    emit(DoneEvent({"step": config.steps}))


def _fail(fault, context, step, run_dir):
    if fault.get("rank") not in (context.rank, "all") or fault.get("step") not in (step, "all"):
        return
    marks = run_dir / f"failed_{context.rank}"
    times = int(marks.read_text()) if marks.exists() else 0
    if times >= fault.get("times", 1000):
        return
    marks.write_text(str(times + 1))
    print(f"rank {context.rank} is about to {fault['do']}")
    if fault["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["do"] == "raise":
        raise ValueError(fault.get("say", "the oar broke"))
    elif fault["do"] == "refuse":
        raise UserError("the corpus is not the one that this run began with")
    elif fault["do"] == "hang":
        time.sleep(1000)
    elif fault["do"] == "wedge":
        heartbeat.count_calls(time.sleep)(1000)
    elif fault["do"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault["do"] == "dawdle":
        time.sleep(0.1)
    elif fault["do"] == "devour":
        resource.setrlimit(resource.RLIMIT_AS, (torch.iinfo(torch.int32).max * 4, resource.RLIM_INFINITY))
        torch.ones(1 << 33)
    elif fault["do"] == "environment":
        (run_dir / f"environment_{context.rank}").write_text(json.dumps(dict(os.environ)))
    elif fault["do"] == "exit":
        os._exit(7)
