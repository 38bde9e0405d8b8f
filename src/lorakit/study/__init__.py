"""Experiments that answer a question end to end."""
