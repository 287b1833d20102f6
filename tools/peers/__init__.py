"""What `tools/bench.py build` measures: the codec's ceiling, our own builder, and others', each in its own Python."""
