"""Rotary position embeddings in a model's own code: recognizes functions that rotate queries and keys, by trials."""
