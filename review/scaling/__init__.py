"""Scaling laws of loss over model size and training tokens (Hoffmann et al. 2022).

scaling_law   L(N, D): fit, bootstrap, compute-optimal frontier, IsoFLOP minima
study         fits the law to run folders and predicts the largest size, which is left out of the fit
isoflop_plan  the runs of a study: sizes, compute budgets, steps
"""
