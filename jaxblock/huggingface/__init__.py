"""Checkpoints in Hugging Face's layout, in and out: the only room that knows safetensors and config.json."""
