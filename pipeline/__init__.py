"""Raw ImageNet to shards (offline), shards to batches on the device (online)."""
