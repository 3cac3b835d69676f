"""One paper, one file. A recipe may import every part and no other recipe."""
