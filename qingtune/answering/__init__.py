"""Answering: a model and its adapter loaded for inference, decoding, and what is built on it."""
