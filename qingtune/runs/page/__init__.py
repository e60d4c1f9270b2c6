"""The page of a run: what its folder holds -> one HTML file."""
