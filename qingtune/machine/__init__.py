"""The machine: its memory, processors and GPUs, and the signals it sends."""
