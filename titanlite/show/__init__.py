"""What a step saw, and what is in a corpus."""
