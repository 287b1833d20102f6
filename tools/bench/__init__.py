"""Benchmarks of the builder, the loader, training and retrieval, beside ceilings and peers."""
