"""Hugging Face parquet files as raw images: single pages are read, so that any row can be had at any time."""
