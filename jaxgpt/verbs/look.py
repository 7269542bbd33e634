"""`jaxgpt inspect`."""
