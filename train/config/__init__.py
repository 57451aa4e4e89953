"""The configuration of a run: composed by Hydra, typed by pydantic, checked as a whole, with a cure for every mistake.

load         from the command line to a checked configuration; alone knows Hydra
schema       the typed tree: every key, type, unit and bound
keys         the keys of each model family and objective
validate     rules between keys
suggest      "did you mean ...?" for unknown keys
sweep_space  keys with several values, and their combinations
"""
