"""The answer in its forms: for a terminal, a browser, a CI job."""
