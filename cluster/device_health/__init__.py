"""Health of GPUs and of the links between them: what they report, and which of them a job should leave.

device_fault    whether a failure is a GPU's, from its error, the counters and the kernel log, pure
evidence        what is known of a rank's GPU when it failed, in words, pure
flight_record   which collective hangs and who has not joined it, from torch's flight recorder, pure
gpu_state       the counters of one GPU at one moment, and how they changed, pure
kernel_log      the driver's messages in the kernel log, and the GPU that each is about
nvml            reads a GPU's counters, where there is a driver
preflight       checks and measures every rank's device before training
preflight_judge which devices failed or lag in these measurements, pure
slow_clocks     which GPUs are held at a lower clock than the others, pure
"""
