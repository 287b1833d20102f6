"""The offline stage: raw images to a dataset directory. Never torch, never DALI."""
