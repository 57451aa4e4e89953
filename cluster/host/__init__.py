"""This host: folders, locks, resources, addresses and signals. Imports no other room of the cluster.

affinity       the cores near a GPU
job_dir        a job's private folder on a host, and the clean-up after jobs that are gone
network        addresses, interfaces and ports of this host
resources      CPUs, GPUs and out-of-memory kills of this host
run_lock       the lock that keeps a run or sweep folder to one driver
stop_request   SIGINT, SIGTERM and SIGHUP as a request to save and stop
"""
