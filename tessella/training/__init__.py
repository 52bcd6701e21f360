"""One loop for every step object."""
