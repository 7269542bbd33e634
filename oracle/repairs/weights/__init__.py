"""Changes that undo what is wrong with stored parameters."""
