"""Parity's parts: layouts (of a run), launch (its ranks), recording (what each computes), comparison (with the first)."""
