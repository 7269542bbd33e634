"""Changes that undo what is wrong with a tokenizer or a template."""
