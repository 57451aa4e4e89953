"""Sharded checkpoints: written asynchronously, verified, readable at any world size and stage.

manifest   checkpoint.json: which element lies in which file, with hashes; which checkpoints to keep
pieces     which elements lie in which file, without a line for each where shares are even
writer     saves: begun between two steps, completed by a thread of each rank
staging    a rank's tensors in host memory, and their safetensors file
reader     verified checkpoints and slices of their parameters
mirror     copies of checkpoints at any URL of fsspec
"""
