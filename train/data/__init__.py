"""From text files to batches: corpora, tokenizer, order of training, rows of each objective.

tokenizer   text to token ids and back
text_cuts   where a text may be cut so that its parts have the tokens of the whole
loader      the micro-batches of one rank: training steps and held-out groups
corpus      a prepared corpus on disk: shards, index, verification
sampling    which tokens make up each step, as pure functions of seed, epoch and position
chat        conversations: kinds of rows, templates, what is trained of them, packing
mixing      several corpora as one: shares, stages, epochs of each source
examples    rows of a batch from stored documents, one module an objective
sources     files with text, of every format
screening   documents that are left out on purpose: quality, evaluation passages, near-duplicates
prepare     text files to a prepared corpus
"""
