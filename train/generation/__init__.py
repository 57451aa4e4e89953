"""Text generation with any model that has ``prefill`` and ``decode``.

sample_loop    sample one token at a time, for a batch of prompts
beam_search    search for the most likely texts
sampling       temperature, top-k, top-p, min-p and repetition penalty on logits
text_streamer  prompts to tokens, and tokens back to text as they come
"""
