"""Prompts and examples: documents, tokenizers, formats and sources."""
