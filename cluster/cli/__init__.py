"""The verbs of ``python -m cluster``: they parse the command line, start the work and print its results.

train           train: one job, or with -m a sweep
cluster         cluster up, join, status, down: a lasting Ray cluster
verify_resume   verify-resume: a stopped run against an unbroken one
"""
