"""Other programs' model files: containers and metadata. Names and layouts come from `jaxgpt.weights`."""
