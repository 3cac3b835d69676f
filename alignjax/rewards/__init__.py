"""Scores of responses: verifiable, learned and judged."""
