"""What runs on either backend: an engine for many requests, evaluation of long contexts and of training histories."""
