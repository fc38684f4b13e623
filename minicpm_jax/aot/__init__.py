"""Programs compiled for chips that are not here, and what they take."""
