"""Durable collections of vectors with similarity search."""
