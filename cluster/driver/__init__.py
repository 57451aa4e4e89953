"""The driver process of a job: from a command line to an exit code.

driver            Driver: error messages, exit codes and the end of all processes, for jobs and sweeps
train_driver      TrainDriver: runs one job
early_start       the fork server, which imports torch while the driver does the rest
prepared_corpus   the corpus of a run, prepared first where it is missing
"""
