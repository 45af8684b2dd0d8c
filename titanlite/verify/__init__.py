"""The proof of document isolation that `python -m titanlite.verify isolation` runs."""
