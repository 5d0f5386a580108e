"""The base model and LoRA on it."""
