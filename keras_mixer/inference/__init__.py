"""What a finished run is good for: evaluation, prediction, export."""
