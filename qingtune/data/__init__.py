"""Data: files -> rows -> conversations -> token ids with a trained mask -> batches."""
