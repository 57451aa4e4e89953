"""Which collective hangs, from dumps of torch's flight recorder: of real gloo ranks, and tables of NCCL's."""

import json
import os
import threading
import time

import pytest
from helpers import gloo_ranks

from cluster.device_health.flight_record import GroupRecord, find_stuck, read_dump


def entry(number, name="nccl:all_reduce", state="completed", size=(4096, 768), group=("0", "default_pg")):
    """One entry as torch 2.13 writes it (version 2.10 of the format), with the fields that every one has."""
    return {
        "collective_seq_id": number,
        "input_dtypes": ["BFloat16"],
        "input_sizes": [list(size)],
        "is_p2p": False,
        "op_id": number,
        "output_dtypes": ["BFloat16"],
        "output_sizes": [list(size)],
        "p2p_seq_id": 0,
        "pg_id": 0,
        "process_group": list(group),
        "profiling_name": name,
        "record_id": number,
        "retired": state == "completed",
        "state": state,
        "thread_id": "139718119897984",
        "thread_name": "pt_main_thread",
        "time_created_ns": 1795869303224094619,
        "time_discovered_completed_ns": 0,
        "time_discovered_started_ns": 0,
        "timeout_ms": 1800000,
    }


def dump(*entries, ranks="[0, 1, 2]"):
    config = {
        "0": {"desc": "default_pg", "name": "0", "ranks": ranks},
        "7": {"desc": "zero", "name": "7", "ranks": ranks},
    }
    return json.dumps({"entries": list(entries), "pg_config": config, "pg_status": {}, "version": "2.10"})


DONE = entry(41)
STARTED, SCHEDULED = (entry(42, state=state) for state in ("started", "scheduled"))
GATHER = entry(42, "nccl:_all_gather_base", "started", (1024,))
OTHER = entry(9, "nccl:_reduce_scatter_base", "started", (512,), ("7", "zero"))


@pytest.mark.parametrize(
    ("by_rank", "culprits", "words"),
    [
        (
            [[DONE, STARTED], [DONE, STARTED], [DONE]],
            (2,),
            "ranks 0, 1 wait in nccl:all_reduce #42 of the default group",
        ),
        ([[DONE, STARTED], [DONE], [DONE]], (1, 2), "which ranks 1, 2 did not join"),
        # one has not even made its group yet
        ([[STARTED], [STARTED], []], (2,), "which rank 2 did not join"),
        # all have enqueued it, and the device of one is busy with something else
        ([[STARTED], [SCHEDULED], [STARTED]], (1,), "has not started on the device of rank 1"),
        ([[STARTED], [GATHER], [STARTED]], (), "rank 1 called nccl:_all_gather_base of 1024"),
        ([[STARTED]] * 3, (), "ranks 0, 1, 2 are in nccl:all_reduce #42 of the default group (4096x768)"),
        # a later one that ranks have enqueued behind it is not the cause
        ([[STARTED, entry(43, state="scheduled")], [STARTED], [DONE]], (2,), "#42"),
        # two groups stand still: the one that a rank has not joined holds up the other
        ([[STARTED, OTHER], [STARTED, OTHER], [STARTED]], (2,), "nccl:_reduce_scatter_base #9 of group zero"),
    ],
)
def test_stuck_collective_and_who_is_to_blame(by_rank, culprits, words):
    stuck = find_stuck({rank: read_dump(dump(*entries)) for rank, entries in enumerate(by_rank)})
    assert stuck.culprits == culprits
    assert words in stuck.text


def test_nothing_is_stuck_where_all_collectives_have_ended():
    assert find_stuck({rank: read_dump(dump(DONE)) for rank in range(3)}) is None
    assert find_stuck({}) is None


def test_silent_ranks_and_ranks_outside_the_group_are_not_blamed():
    records = {rank: read_dump(dump(STARTED, ranks="[0, 1]")) for rank in (0, 1)}
    assert find_stuck({**records, 2: read_dump(dump())}).culprits == ()
    assert find_stuck({0: records[0]}).culprits == (), "rank 1 gave no record: it may be in it"


def test_each_backend_of_a_group_counts_for_itself():
    gloo = entry(900, "gloo:all_reduce")
    assert find_stuck({0: read_dump(dump(gloo, STARTED)), 1: read_dump(dump(gloo))}).culprits == (1,)


def test_dumps_that_cannot_be_read_have_no_groups():
    assert read_dump(b"") == read_dump("{") == read_dump("{}") == []


def test_records_survive_the_way_to_the_driver():
    records = read_dump(dump(DONE, STARTED, OTHER))
    assert [GroupRecord.from_json(json.loads(json.dumps(record.to_json()))) for record in records] == records


def leave_one_out(context, emit, folder):
    """All but rank 1 enter a second all-reduce; then each writes its record, as a worker does when asked."""
    import torch
    import torch.distributed as dist

    from cluster.worker import flight_dump
    from train.util.io import write_whole

    dist.all_reduce(torch.ones(3))
    if context.rank != 1:
        threading.Thread(target=dist.all_reduce, args=(torch.ones(5, 2),), daemon=True).start()
    time.sleep(0.5)
    write_whole(folder / f"rank_{context.rank}.flight.jsonl", b"\n".join(flight_dump.dump_recorders()))
    end = time.monotonic() + 20
    while len(list(folder.glob("rank_*.flight.jsonl"))) < context.size and time.monotonic() < end:
        time.sleep(0.05)
    os._exit(0)


def test_rank_that_does_not_join_is_found_among_real_gloo_ranks(tmp_path):
    gloo_ranks.start(3, leave_one_out, tmp_path).wait(60)
    records = {}
    for rank in range(3):
        lines = (tmp_path / f"rank_{rank}.flight.jsonl").read_bytes().splitlines()
        records[rank] = [record for line in lines for record in read_dump(line)]
    stuck = find_stuck(records)
    assert stuck.culprits == (1,)
    assert stuck.text == ("ranks 0, 2 wait in gloo:all_reduce #2 of the default group (5x2), which rank 1 did not join")
