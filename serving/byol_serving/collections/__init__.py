"""Durable collections of vectors with similarity search."""

import os

# FAISS's OpenMP threads wait for each other spinning, by default. On a machine that does anything
# else, a server above all, that costs more than the work: training a small product quantiser took
# 56 s beside other processes and takes 2 s so. It is read once, when FAISS is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
