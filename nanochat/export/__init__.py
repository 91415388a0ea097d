"""Trained models as folders for transformers."""
