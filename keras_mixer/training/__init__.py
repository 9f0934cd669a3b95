"""Training: from a Config to a run directory with checkpoints and the best weights."""
