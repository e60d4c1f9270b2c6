"""Planning: memory and time of a run, worked out before it starts."""
