"""The experiments that test the papers' claims."""
