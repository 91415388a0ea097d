"""Decoding: one engine for chat, serving, evaluation and reinforcement learning."""
