"""Changes that undo what is wrong with batches, losses, gradients and steps."""
