"""Training: data, models, objectives and the loop, as one process of a job runs them.

__main__       the verbs that run in one process
run            assembly of one rank's run: ``train_rank``
loop           the training loop
services       logging, evaluation, sampling, checkpoints and the summary of a run
evaluate       exact evaluation on the held-out split
batch          the contract between data, objectives and metrics
events         the messages of ranks, driver and sweeps
errors         exit codes, and the exceptions that end a run early
printable      text and names of users, without what a terminal would obey
kernel_setup   choice of kernels and tuning of tiles
config         schema, loading and validation of configurations
data           from text to batches
models         families of networks
objectives     losses
optim          optimizers and schedules
engine         DeepSpeed behind one class
distributed    process group, parameter shards and heartbeat
state          the state of a run beside weights and moments
checkpoint     saving, loading and mirroring of checkpoints
stability      the guard against bad steps, and early stopping
planning       memory and time of a run, predicted before it starts
pretrained     weights from elsewhere, and export
generation     text from a model
run_dir        a run's folder, read again
reporting      console, metrics files and W&B
cli            the verbs' parsing and printing
util           files, formats, seeds and redaction
"""
