"""A job's supervision by its driver: places workers, starts attempts, explains failures, restarts.

attempt          one start of all ranks, followed from the forks to the last exit
attempt_state    phases of an attempt and the transitions between them, pure
failure_report   the text that explains a failure to its reader, pure
hang_detector    which ranks hang or lag, from their heartbeats, pure
health_monitor   watches the living ranks of an attempt and gathers evidence
job              the job's configuration and connections that these modules share
left_places      GPUs and hosts that a job does not use any more, and the room beside them, pure
outcome          the verdict on an attempt from the exits of its ranks, pure
restart_policy   whether and when a failed job starts again, pure
slots            placement groups and agents of the job's workers
supervisor       the loop over attempts: place, start, follow, restart
timeouts         time limits that depend on one another, with their inequalities
"""
