"""Fault injection: real faults in real runs, and whether the job recovers from each of them.

drill            the verb drill: two runs of the user's configuration, one of them disturbed
faults           the kinds of fault, what the job must say of each, and the verdict on what was observed
inject           DisturbedRun: injects each kind of fault into a run and observes how it recovers
fault_injector   FaultInjector: signals, limits and cut-offs for processes on this host and others
train_process    TrainProcess: the command train in a process of its own, followed by the files it writes
"""
