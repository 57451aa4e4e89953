"""Sweeps: many runs of one command, each a job of many workers on the one cluster that they share."""
