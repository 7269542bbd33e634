"""One file a verb of `python -m oracle`: `add` declares it, `run` carries it out."""
