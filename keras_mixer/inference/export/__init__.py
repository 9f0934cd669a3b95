"""Exports models for deployment: a table of formats, one file for each, numbered versions."""
