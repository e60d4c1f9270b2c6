"""Comparison of training setups: trials, search, and tables of what was measured."""
