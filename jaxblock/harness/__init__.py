"""Runs the tasks of EleutherAI's lm-evaluation-harness (the package ``lm-eval``) on a ``Model``."""
