"""Exports a model to other formats; each file writes one of them."""
