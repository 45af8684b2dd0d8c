"""Parity's parts: layouts, launch (of ranks), recording (of steps), ending (behind the last), sketches, comparison."""
