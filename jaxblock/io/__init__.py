"""Reads and writes files, folders and JSON lines, on a local disk or in an object store; downloads from the Hugging Face hub."""
