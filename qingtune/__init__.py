"""Fine-tune causal language models by full training, LoRA or QLoRA; then talk to the result and merge it."""

__version__ = "0.1.0"
