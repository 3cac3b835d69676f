"""Composition roots, one file per verb. Nothing imports this room."""
