"""Configuration: every setting defined once, and read from files and flags."""
