"""A run: its start, and its story."""
