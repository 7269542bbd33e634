"""The rungs of the ladder: one file each, a `NAME` and a `run` that returns a `RungResult`."""
