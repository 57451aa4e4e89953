"""DeepSpeed ZeRO behind one class; no other package imports DeepSpeed.

engine       ``Engine``: train one step, evaluate, read and load the state as shards
zero_layout  where each ZeRO stage keeps its fp32 master weights
ds_config    DeepSpeed's settings for a run's configuration
precision    choice of the number format, once for all ranks
allocation   memory for the parameters of a module described on meta
gradient_check  the gradient of a run's first step against plain autograd in one process
ds_patches   settings and patches of DeepSpeed, for a quick start and one without a copy of the model
short_collectives  stage 3's gathers and reductions in a few operators, for a dry run
"""
