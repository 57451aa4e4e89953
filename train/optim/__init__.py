"""Optimizers and learning-rate schedules.

factory       parameter groups and the optimizer of a run
optimizers    Lion and Adagrad, written so that ZeRO can shard them
muon          Muon under any ZeRO stage
schedule      learning rate as a pure function of the step
layerwise_lr  learning rates that decay with depth, for fine-tuning
"""
