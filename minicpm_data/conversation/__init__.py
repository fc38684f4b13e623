"""Conversations: chat templates, what a template supports, and messages in the form that templates expect."""
