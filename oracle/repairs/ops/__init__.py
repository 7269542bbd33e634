"""Changes that undo what is wrong with a single op."""
