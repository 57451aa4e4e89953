"""Ray: places the workers of a job, keeps them alive, and says what happened to them."""
