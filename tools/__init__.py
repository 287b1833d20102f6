"""What a person runs: thin commands around `pipeline` and `trainer`."""
