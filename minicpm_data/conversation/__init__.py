"""Conversations with thoughts and tools, as text: what a model is asked, and what it answers."""
