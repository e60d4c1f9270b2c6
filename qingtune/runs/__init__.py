"""Runs: the folder of a run and the files in it."""
