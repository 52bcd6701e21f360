"""What a reconstruction is trained for: one file a medium or task, the recipe's ``[loss]``."""
