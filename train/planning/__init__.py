"""Prediction of a run before it starts: memory of a rank by part, seconds of a step, and what else would fit.

allocations  log of what is allocated and freed; its peak, by part
dry_mode     runs torch's operators on shapes alone, and logs their memory and work
dry_run      one rank of a run's own engine, in any world, with nothing computed
gpus         GPUs by their data sheets
collectives  bytes and seconds of what ranks exchange
step_time    seconds of a step by a roofline
choices      a configuration on a cluster, and the others that make the same steps
batches      a step's micro-batches, with full rows and without a corpus
"""
