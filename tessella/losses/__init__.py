"""Training losses beyond the pixel distance; each in its own file."""
