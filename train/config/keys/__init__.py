"""Keys of each model family and of the objectives, without torch: the driver reads them too.

base        base classes of all sections and families
decoder     GPT-2, Llama
encoder     BERT
encdec      T5, the original Transformer
recurrent   RNN, LSTM, GRU
objectives  causal, masked, seq2seq, classify
mixture     sources of a mixture of corpora, and stages of their shares
"""
