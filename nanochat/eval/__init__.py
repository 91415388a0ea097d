"""Measurements of a model: losses, multiple choice, CORE, recorded results."""
