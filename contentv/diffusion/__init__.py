"""Rectified flow: interpolation and loss, distributions of the noise level, and the Euler solver."""
