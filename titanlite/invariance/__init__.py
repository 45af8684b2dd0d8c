"""Parity's parts: layouts, launch (of ranks), recording (what each computes), comparison (with the first layout)."""
