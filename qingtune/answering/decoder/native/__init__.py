"""Kernels in C, compiled for the machine they run on where it has a compiler."""
