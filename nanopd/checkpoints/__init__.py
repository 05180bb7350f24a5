"""Model directories: configuration, tokenizer, the demo model."""
