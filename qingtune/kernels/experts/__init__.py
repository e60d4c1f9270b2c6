"""Mixtures of experts: the block, the experts' matrices and modules, and their sizes."""
