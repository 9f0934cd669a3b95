"""Measures speed and memory, in worker processes that take turns."""
