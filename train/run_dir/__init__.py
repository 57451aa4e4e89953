"""Run folders: what a run leaves, read again to resume, evaluate or compare it.

compare      whether two runs are equal, number by number and tensor by tensor
environment  versions, commit and machine of a run
open_run     a run at one of its checkpoints, ready to evaluate, generate or export
mixture_stages  the stages of a run on a mixture, and what an earlier start has read of it
resume       whether a configuration may continue the run of a folder
"""
