"""The gated delta net of Qwen3.5: its block, its recurrence and its sizes."""
