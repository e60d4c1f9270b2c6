"""Output: what reaches the screen, and what must not leave the machine."""
