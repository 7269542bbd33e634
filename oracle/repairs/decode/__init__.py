"""Changes that undo what is wrong with cached steps."""
