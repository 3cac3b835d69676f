"""What a step costs on a TPU that nobody has rented yet."""
