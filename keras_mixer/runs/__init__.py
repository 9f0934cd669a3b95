"""The run directory: its files, opening and locking it, checkpoints, resuming."""
