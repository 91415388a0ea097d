"""Evaluation wing: losses, multiple choice, CORE, and the record of results."""
