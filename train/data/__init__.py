"""From text files to batches: corpora, tokenizer, order of training, rows of each objective.

tokenizer   text to token ids and back
text_cuts   where a text may be cut so that its parts have the tokens of the whole
loader      the micro-batches of one rank: training steps and held-out groups
corpus      a prepared corpus on disk: shards, index, verification
sampling    which tokens make up each step, as pure functions of seed, epoch and position
mixing      several corpora as one: shares, stages, epochs of each source
examples    rows of a batch from stored documents, one module an objective
prepare     text files to a prepared corpus
"""
