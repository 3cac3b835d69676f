"""Merging methods, a file each; see alignjax.merge.method."""
