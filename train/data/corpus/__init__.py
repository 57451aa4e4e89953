"""A prepared corpus on disk, opened and verified.

shards           WebDataset shards, tables of samples and the index: reading and writing
index_schema     checks of an index, a table and a tar that may come from somebody else
verified_files   sha256 of files, computed once for each state of a file
"""
