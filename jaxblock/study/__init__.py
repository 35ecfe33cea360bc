"""Compares ways of training: pairs their scores, and computes intervals, tests and crossovers."""
