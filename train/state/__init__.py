"""State of a run beside weights and moments.

train_state   TrainState: step, data cursor, counts and best score, as checkpoints keep them
loss_history  robust limits on the losses of recent steps
"""
