"""Rank-aware logging: one logger, one line format, and only the chosen ranks speak below WARNING."""

import logging
import os
import sys

logger = logging.getLogger("titanlite")


def init_logging(rank: int = 0) -> None:
    """Send titanlite's log to stderr, prefixed with time and rank.

    Every rank prints warnings and errors; information comes from the ranks named in the environment
    variable LOG_RANK (comma-separated, default "0").
    """
    speaking = {int(r) for r in os.environ.get("LOG_RANK", "0").split(",") if r.strip()}
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank{rank}] %(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank in speaking else logging.WARNING)
    logger.propagate = False
