"""What only several chips need."""
