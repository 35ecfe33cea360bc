"""Reads and writes checkpoints and adapters in Hugging Face's layout; no other package reads or writes safetensors."""
