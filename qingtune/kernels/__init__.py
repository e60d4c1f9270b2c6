"""Kernels: quantised linear layers, attention over samples laid end to end, and the loss."""
