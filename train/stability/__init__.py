"""Stability: steps that go wrong, and when to stop early.

guard           detects non-finite or spiking steps, rolls back and masks the rows to blame
skipped_rows    skipped.jsonl: the rows that a run leaves out
find_documents  which documents are in a step
nonfinite       the first layer with non-finite output; resetting a model to step 0
early_stopping  whether the metric has stopped improving
"""
