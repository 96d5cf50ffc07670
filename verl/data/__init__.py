"""Data: rows to prompts, tokenizer and image processor."""
