"""The model hub: what lies there, whole downloads, uploads of one commit each."""
