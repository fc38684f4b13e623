"""Code that only several chips need."""
