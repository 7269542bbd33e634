"""The rows of the catalogue, one table a kind of mistake."""
