"""Penstock: raw ImageNet to shards, shards to GPUs. The distribution is called penstock-imagenet."""

__version__ = "0.1.0"
