"""What `tools/bench.py` measures: ceilings, our own builder and loader, and those of others, each in its own Python."""
