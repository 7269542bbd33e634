"""The parts of `jaxgpt check`: each a function from a loaded model to one line of the report."""
