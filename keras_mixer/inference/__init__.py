"""Evaluation, prediction, few-shot evaluation and export of trained models."""
