"""Text files to a prepared corpus: read, clean, deduplicate, split, tokenise, write shards.

prepare        the entry points: prepare a corpus, or find a prepared one
documents      documents of a corpus: their cleaned text, and how to read each again
clean          normalisation of one document
first_pass     the first reading: documents found, screened and hashed, duplicates dropped
corpus_spec    settings, documents and splits that define a corpus, and their digest
build          writes tokenizer, shards, tables and index of a spec
chat_shards    shards of conversations: rendered, encoded, cut by turn, packed
workers        functions that run in the worker processes, and their pool
progress_bar   preparing with progress shown on a console
"""
