"""Text generation with any model that has ``prefill`` and ``decode``.

sample_loop    sample one token at a time, for a batch of prompts
prompts        the prompts of a run's samples, and their tokens
beam_search    search for the most likely texts
sampling       temperature, top-k, top-p, min-p and repetition penalty on logits
text_streamer  generates text from prompts, decoded as its tokens come
"""
