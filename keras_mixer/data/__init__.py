"""Reads datasets of images and labels."""
