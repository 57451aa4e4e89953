"""A mixture of prepared corpora, its *sources*, as one thing that the loader reads.

mixture_schedule  which source each row of training comes from: shares, stages, sources that run out
prepare_sources   prepares the sources, with one tokenizer for all
source_rows       the endless rows of one source, epoch after epoch, without padding
mixture_plan      streams and steps of a mixture: the interface of ``sampling.batch_plan``
mixture_corpus    several corpora of one tokenizer under one numbering of samples; opens a corpus or a mixture
stages            shares and stages of a configuration, in steps; what a resumed run may change of them
"""
