"""The parts of tools/gpu_check.py: each takes a Scale and gives a Result."""
