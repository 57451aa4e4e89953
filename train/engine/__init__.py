"""DeepSpeed ZeRO behind one class; nothing outside this room knows DeepSpeed.

engine       ``Engine``: train one step, evaluate, show and load the state as shards
zero_layout  where each ZeRO stage keeps its fp32 master weights
ds_config    DeepSpeed's settings for a run's configuration
ds_patches   what must be set before DeepSpeed is imported, so that a start is quick
"""
