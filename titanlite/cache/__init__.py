"""Writing a token cache, and looking after what lies in the cache folder."""
