"""Distributed: the process group of a run, sharded state, and the heartbeat of a rank.

process_group  joins the ranks; small collectives on objects and numbers, and messages through the store
param_shard    ParamShard: model and optimizer state without its ZeRO stage or world size
determinism    the settings of cluster.deterministic
heartbeat      what a rank is doing, in shared memory that its agent reads
device         a rank's device, as values that decisions are made from
"""
