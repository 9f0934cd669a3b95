"""What a run computes with: devices, precision, fast mixing, rematerialization, processes."""
