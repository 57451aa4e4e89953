"""The last that the server of forks imports: what it holds lives as long as it does, and no rank's collector need look through it.

Else each rank copies every page of it at its first collection: a third of what a small world costs.
"""

import gc

gc.collect()
gc.freeze()
