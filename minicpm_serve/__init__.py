"""What runs on either backend: an engine for many requests, a server with OpenAI's API, evaluation of long contexts and
of training histories."""
