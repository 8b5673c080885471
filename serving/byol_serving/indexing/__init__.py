"""Offline indexing: any number of images to vectors, in bounded memory, resumable at any point.

sources   ──> stages.decode ──> stages.encode ──> sinks
(entries)     (thread pool)     (per device)      (Parquet, .npy, collection)
pipeline.run joins them; journal remembers finished shards
"""
