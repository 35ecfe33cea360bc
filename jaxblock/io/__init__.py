"""Reads and writes files, folders and JSON lines, on a local disk or in an object store, and downloads from the hub."""
