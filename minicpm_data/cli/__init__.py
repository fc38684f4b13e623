"""Command lines shared by both backends."""
