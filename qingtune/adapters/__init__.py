"""Adapters: which layers, the LoRA layer itself, and files that PEFT reads."""
