"""Pretrained weights: import from runs and Hugging Face folders (``init.from``), and export.

inspect_source  reads the configuration of ``init.from`` and compares it with the run's, without loading weights
weight_source   opens the weights of ``init.from``: a checkpoint of a run, or a Hugging Face folder
init_from       loads those weights into a new run's model, and freezes parameters
export          writes a run as a folder that transformers loads, and verifies it; the only user of transformers
hf              the Hugging Face format: one table per model family, safetensors folders
"""
