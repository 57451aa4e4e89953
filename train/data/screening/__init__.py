"""Documents that are left out on purpose: off unless asked for, each with counts and examples.

screen           the judgement of one document, and what was dropped
word_grams       the words of a text, and sequences of them
quality          rules of Gopher and C4
contamination    passages of evaluation files
near_duplicates  MinHash signatures, and groups of documents with alike ones
"""
