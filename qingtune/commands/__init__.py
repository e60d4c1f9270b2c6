"""Commands, one a file: each reads its settings, has the rooms do the work, and reports the result."""
