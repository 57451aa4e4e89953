"""Reports on run folders: HTML page, PNG figures, Markdown comment, scaling law. Imports only train.

run_reader       reads one run folder, or all in a folder, into RunRecords; never raises on damaged files
sweep_reader     reads a sweep's ledger: its goals, and the state of each trial
lenient_io       JSON readers that turn damage into notes; whether a driver holds a lock
run_differences  which configuration keys differ, which run is best, and whether by more than seed noise
importance       permutation importance of the keys that differ
search_history   the trials of one sweep in order, with the best score so far
wall_time        shares of wall time by cause
rank_times       seconds of a step by rank: the spread, and the slowest rank
colors           one color for each run, and the scale from best to worst
downsample       thins and averages long curves
figures          PNG figures (matplotlib)
markdown         the comment for a pull request
html             the page, one self-contained file
scaling          scaling laws: fit, study and IsoFLOP plan
"""
