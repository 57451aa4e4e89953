"""The verbs of ``python -m cluster``: they parse words, start the work and print results.

train           train: one job, or with -m a sweep
cluster         cluster up, join, status, down: a lasting Ray cluster
verify_resume   verify-resume: a stopped run against an unbroken one
verify_gradient verify-gradient: the first gradient against plain autograd
"""
