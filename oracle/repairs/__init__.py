"""The changes that undo known causes of a difference, by what they change."""
