"""Reinforcement wing: learning from rewards and from preferences."""
