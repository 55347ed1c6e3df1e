"""Batch and model to a loss: flow matching, and reinforcement from a differentiable reward."""
