"""Sweeps: many runs of one command, each a job of many workers, on one cluster that they share.

sweep_driver   SweepDriver: from a command line with several values to an exit code and results.csv
scheduler      which trial runs next, which ends early, which is tried again
trial          one trial: what is known of it, and its job while it runs
slot_pool      the slots of the next trial's workers, waited for and handed on
search         Optuna: which values to try next, which trials to prune
ledger         ledger.jsonl: what became of each trial, for the next start
board          the table on the terminal
"""
