"""From text to batches: corpora, shards, streams and the loader."""
