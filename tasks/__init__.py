"""Tasks: data sets of conversations for training and evaluation."""
