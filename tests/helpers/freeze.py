"""Freezes the garbage collector's objects; imported last by the tests' fork server.

Its modules live as long as it does. Were they not frozen, each forked rank would copy all their pages at its first
collection, which takes a third of a small job's time.
"""

import gc

gc.collect()
gc.freeze()
