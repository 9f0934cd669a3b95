"""Reads, adapts and writes pretrained weights of all known formats."""
