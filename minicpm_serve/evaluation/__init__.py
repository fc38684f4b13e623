"""Evaluations over either backend."""
