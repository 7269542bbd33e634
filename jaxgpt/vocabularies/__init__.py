"""Base vocabularies: text to ids without special tokens, and the files they come in."""
