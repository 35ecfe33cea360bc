"""Ahead-of-time plans: what a run needs of a topology, and what to change where it does not fit."""
