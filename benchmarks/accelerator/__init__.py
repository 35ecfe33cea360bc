"""Measures jaxblock on one host with GPUs or TPUs: parity, weights, LoRA steps, decoding, attention, checkpoints, quickstart.

``python -m benchmarks.accelerator`` runs every item in a process of its own, within a time limit, and writes what was found
after each of them. ``docs/benchmarks.md`` says how to use it.
"""
