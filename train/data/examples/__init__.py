"""How a sample of a shard becomes a row of a Batch, one file an objective."""
