"""The token stream: source (documents) -> stream (tokens) -> packing -> rows (of all sources) -> loader (batches).

Only `loader` needs torch, so this module imports nothing.
"""
