"""Command-line verbs of ``python -m train``: they parse options, call a room and print.

evaluate  metrics of a checkpoint on held-out text
chat      a conversation with the model of a run
look      rows of a run as they are trained
plan      memory, time and cost of a run on GPUs that need not be there
generate  text from a checkpoint, written as it is drawn
"""
