"""Front ends over either backend: evaluation of long contexts and of training histories."""
