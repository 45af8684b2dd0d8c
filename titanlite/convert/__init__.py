"""Hugging Face's form of a LLaMA: its names, weight files, config.json and tokenizer.json, read and written.

Needs none of Hugging Face's packages: they check the result where they are installed.
"""
