"""What show and verify data need and training does not: counting a corpus, finding a row, and proving what was read."""
