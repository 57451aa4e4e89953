"""Reporting: every number and line that a run shows or writes.

activity       the phase of a rank: heartbeat, events and cause of its seconds, marked together
console        events to lines on the terminal
failure_block  how a failure and a recovery look on the terminal
goodput        where the seconds of a run went, by cause
meter          a run's speed, utilisation and GPU memory, since the last record and since the start
metrics        formulas of model quality: perplexity, F1, Spearman, ...
profiler       traces of named steps for Perfetto, and memory snapshots
run_outline    sizes of model, work and corpus before the first step
terminal       a console that takes text of users as it is
throughput     tokens per second, peak rates of GPUs and MFU
tracking       metrics.jsonl, run.json, summary.json and W&B
"""
