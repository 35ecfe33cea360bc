"""Scoring: graders, statistics, and the runner that decodes problems and grades them."""
