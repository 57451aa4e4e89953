"""Which tokens make up each training step: pure functions of seed, epoch and position.

epoch_order   the shuffled order of an epoch, and any range of it as spans of documents
batch_plan    streams, steps and rows of the global batch, and ``data_hash``
"""
