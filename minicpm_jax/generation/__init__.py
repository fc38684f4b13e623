"""Generation on the compiled programs."""
