"""Comparisons and measurements of a model."""
