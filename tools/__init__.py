"""Commands that a person runs: thin layers over `pipeline` and `trainer`."""
