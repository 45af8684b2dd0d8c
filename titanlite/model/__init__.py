"""The document rule with its realisations, and LLaMA as plain modules."""
