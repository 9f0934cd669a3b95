"""Studies that train: sweeps, transfer, resizing; and the benchmark."""
