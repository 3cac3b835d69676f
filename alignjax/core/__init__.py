"""The words: imports nothing of ours."""
