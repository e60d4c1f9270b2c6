"""The decoder for answering: merged and packed weights, and a static cache of keys and values."""
