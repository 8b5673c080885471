"""Serving: an encoder bundle becomes embeddings over gRPC and nearest-neighbour answers."""
