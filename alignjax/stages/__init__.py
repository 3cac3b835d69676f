"""Batch -> batch: what happens between and inside steps."""
