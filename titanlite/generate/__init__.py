"""How a model continues prompts: text in and out, batches of prompts with a KV cache, and how tokens are drawn."""
