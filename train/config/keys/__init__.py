"""Keys of each model family, of objectives, the batch and generation, without torch: the driver reads them too.

base        base classes of all sections and families
batch_size  sequences of a step, and a ramp up to them
data        the corpus and its tokenizer
decoder     GPT-2, Llama
encoder     BERT
encdec      T5, the original Transformer
recurrent   RNN, LSTM, GRU
objectives  causal, masked, seq2seq, classify
generation  decoding settings of generated text
mixture     sources of a mixture of corpora, and stages of their shares
"""
