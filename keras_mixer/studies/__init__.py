"""Studies, which train many runs: sweeps, transfer and resizing."""
