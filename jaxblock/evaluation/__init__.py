"""Scores a network: decodes and grades problems, estimates the NELBO, and compares evaluations."""
