"""Other people's files: read, written and certified, one tensor at a time."""
