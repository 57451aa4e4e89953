"""Runs training jobs on Ray: places their workers, keeps them alive, and says what happened to them.

cli            the verbs train, cluster and verify-resume
driver         the process of one command, from the early start to the exit code
sweep          many jobs of one command on one cluster
chaos          the verb drill: real faults in real runs
supervision    one job: its attempts, the health of its workers, restarts
raycluster     Ray clusters and their nodes, for one job or many
device_health  GPUs and the links between them: faults, counters, checks before training
worker         the processes on each host: agent, fork server, workers
host           the host that a process is on: folders, resources, locks, signals
"""
