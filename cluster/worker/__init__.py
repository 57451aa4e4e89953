"""A rank's processes on its host: the agent watches, the fork server starts, the worker trains.

agent                Ray actor that starts, watches and signals its host's workers
cuda_probe           whether CUDA can be used on a host, without starting it in the fork server
exit_record          a worker's last word in the run's folder, for when its agent is gone
flight_dump          writes a hung worker's last collectives at its agent's request
fork_server          imports everything once and forks the workers of its host
fork_server_client   starts a host's fork server and connects to it; light to import
ipc                  JSON messages over Unix sockets and event pipes
messages             what driver, agents and workers tell each other, typed
procfs               a process's state, memory and kernel wait, from /proc
worker_env           the environment of a worker, as a pure function
worker_handle        an agent's view of its worker: heartbeat, signals, stack, log tail
worker_main          entry point of a worker process: joins the process group and runs the target
"""
