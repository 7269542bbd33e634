"""From text and chats to batches: sources, encode, shards, episodes, batches. Imports no JAX."""
