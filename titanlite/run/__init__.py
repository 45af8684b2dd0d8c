"""A process as a rank of a run: joining the others, stopping, who hangs, whose folder it is, and what it logs."""
