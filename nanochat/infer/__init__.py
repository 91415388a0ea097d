"""Inference wing: one decoding engine for chat, serving, evaluation and reinforcement learning."""
