"""Datasets of conversations, for training and for evaluation."""
