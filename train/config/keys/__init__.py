"""The keys of each model family and of the objectives. Light: the driver reads them without torch.

base        base classes of all sections and families
decoder     GPT-2, Llama
encoder     BERT
encdec      T5, the original Transformer
recurrent   RNN, LSTM, GRU
objectives  causal, masked, seq2seq, classify
"""
