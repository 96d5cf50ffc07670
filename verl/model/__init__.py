"""Model: families, packed attention, log-probs, activation checkpointing, LoRA."""
