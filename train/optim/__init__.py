"""Optimizers and learning-rate schedules.

factory        parameter groups and the optimizer of a run
optimizers     Lion and Adagrad, written so that ZeRO can shard them
muon           Muon under any ZeRO stage
matrix_owners  whole matrices from ZeRO's shards, each on one rank, and back
schedule       learning rate as a pure function of the step
layerwise_lr   learning rates that decay with depth, for fine-tuning
"""
