"""Configuration of a run: composed by Hydra, typed by pydantic, checked as a whole.

load         from the command line to a checked configuration; the only user of Hydra
schema       the typed tree: every key with its type, unit and bounds
keys         the keys of each model family and objective
validate     rules between keys
mixture_rules  those of a mixture's sources and stages
key_effects  keys that only some choices have
suggest      "did you mean ...?" for unknown keys
sweep_space  keys with several values, and their combinations
sweep_dir    file names and trial states of a sweep's folder
text_keys    values of keys of text, whatever characters they have
wandb_mode   the mode of W&B that its own variables and files ask for
"""
