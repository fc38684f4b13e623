"""The web page to chat with a model: ``python -m minicpm_serve.web``."""
