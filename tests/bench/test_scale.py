"""The measurement of the control plane: a job over simulated hosts, and how its reports are read."""

import random

import pytest

from bench import scale
from cluster.supervision.hang_detector import format_ranges


@pytest.mark.parametrize("ranks", [{0}, {3, 4, 5, 9}, {7, 1023}, set(range(1024))])
def test_ranks_of_a_note_are_read_as_they_were_written(ranks):
    assert scale.ranks_in(f"{format_ranges(sorted(ranks))} on 2 hosts are slow: they work 2.0 times as long") == ranks


def test_fault_with_another_name_or_a_late_report_misses_the_goals():
    well = scale.Answer("kill", 1.0, True, "rank 3 on host-0000 killed by SIGKILL", 2.0)
    row = {"ranks": 8, "driver_cores": 0.1, "answers": [vars(well)]}
    assert scale.missed(row) == []
    late = {**vars(well), "noticed_s": 9.0}
    [problem] = scale.missed({**row, "answers": [late]})
    assert problem == "8 ranks: kill: noticed after 9.0 s"
    [problem] = scale.missed({**row, "answers": [{**vars(well), "named": False}]})
    assert problem.startswith("8 ranks: kill was reported as: rank 3 on host-0000")


def test_simulated_job_names_a_killed_rank_and_goes_on(tmp_path):
    job = scale.SimulatedJob(tmp_path, ranks=8, work_s=0.2, overrides=[])
    try:
        job.wait_until_met()
        job.wait_until_training()
        where = job.locations()
        assert len({each["host"] for each in where}) == 4
        assert len({each["steward"] for each in where}) == 4  # three hosts alone, and one process for the rest
        answer = scale.inject(job, "kill", random.Random(1))
    finally:
        job.end()
    assert answer.named, answer.report
