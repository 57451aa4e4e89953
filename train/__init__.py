"""Training: data, models, objectives and the loop, as one process of a world sees them."""
