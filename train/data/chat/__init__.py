"""Conversations as data: rows of JSON to token ids with a mask of what is trained.

conversations  the kinds of rows that are known, and the one form that all become
sandbox        Jinja templates that may be anybody's: no code, bounded output and time
template       the text of a conversation and the parts of it that are trained, and their token ids
packed_rows    whole conversations packed into rows of one length, as shards hold them
templates      the templates that are given, by name
"""
