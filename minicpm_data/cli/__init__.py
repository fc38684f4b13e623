"""Command lines that both backends have."""
