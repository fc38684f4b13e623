"""The text that the built-in model was trained on."""
