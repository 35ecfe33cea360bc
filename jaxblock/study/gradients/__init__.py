"""Measures the gradients of a study's checkpoints: their variance, their direction, and how tight the bound is."""
