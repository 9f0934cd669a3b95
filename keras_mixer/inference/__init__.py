"""Evaluation, prediction and export of trained models, few-shot, and verification of weights."""
